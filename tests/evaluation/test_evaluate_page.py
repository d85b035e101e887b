"""docs/evaluate.md as somebody types it: its Python runs, its commands are understood."""

import re
import shlex
from pathlib import Path

import typer

from fastdiff import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        exec(block, {})
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "all", "as many", "real (floor)"
    ]  # fmt: skip


def test_the_commands_are_understood():
    app = typer.main.get_command(cli.app)
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    commands = [words[1:] for words in lines if words[0] == "fastdiff"]
    assert len(commands) == 3
    for name, *arguments in commands:
        context = typer.Context(app, info_name="fastdiff")
        app.get_command(context, name).make_context(name, arguments, parent=context)
