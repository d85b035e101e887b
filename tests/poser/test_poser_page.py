"""docs/poser.md as somebody types it: its Python runs, its experts.toml and its commands are understood."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from fastdiff import cli
from fastdiff.poser.config import Config

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "poser.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_python_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("stable_baselines3")
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        exec(block, {})
    assert "End(ends=" in capsys.readouterr().out


def test_the_file_is_understood(tmp_path):
    for block in blocks("toml"):
        (tmp_path / "experts.toml").write_text(block)
        config = Config.read(tmp_path / "experts.toml")
        assert [spec.kind for spec in config.expert] == ["draw", "edits"]
        assert (config.rules.keep_best, config.budget.cost, config.hand["tone"]) == (True, 2.0, "remote-edit")


def test_the_commands_are_understood():
    group = typer.main.get_command(cli.app).commands["poser"]
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    asked = [words[2:] for words in lines if words[:2] == ["fastdiff", "poser"]]
    assert {name for name, *_ in asked} == {"run", "replay", "train", "serve", "evaluate"}
    for name, *arguments in asked:
        context = typer.Context(group, info_name="poser")
        group.get_command(context, name).make_context(name, arguments, parent=context)
