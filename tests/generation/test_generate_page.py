"""docs/generate.md as somebody types it: its Python runs, its commands are understood."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from fastdiff import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert capsys.readouterr().out.startswith("few-digits: 16 images, sha256 ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few-digits", "two-pictures"]


def test_the_commands_are_understood(tmp_path, monkeypatch):
    app = typer.main.get_command(cli.app)
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    lines = [words for words in lines if "fastdiff" in words]
    assert len(lines) > 12
    for words in lines:
        name, *arguments = words[words.index("fastdiff") + 1 :]
        context = typer.Context(app, info_name="fastdiff")
        app.get_command(context, name).make_context(name, arguments, parent=context)


def test_torchrun_passes_the_arguments_on():
    """It takes what begins like an option of its own, such as --num, wherever it stands."""
    distributed = pytest.importorskip("torch.distributed.run")
    line = next(line for block in blocks("sh") for line in block.splitlines() if line.startswith("torchrun"))
    asked = distributed.parse_args(shlex.split(line, comments=True)[1:])
    assert (asked.nproc_per_node, asked.training_script) == ("8", "fastdiff")
    assert asked.training_script_args == ["generate", "-n", "1000000", "--out", "big", "--model", "my-model"]
