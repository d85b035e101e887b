"""docs/text.md as somebody types it, with small random networks in place of the models that it names."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import random_pipeline

from fastdiff import cli
from fastdiff.text import load as loading
from fastdiff.text import single_file

PAGE = (Path(__file__).parents[2] / "docs" / "text.md").read_text()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, a file, a photo and a mask."""
    models = {"emoji": random_pipeline.make(tmp_path / "folder")}
    kind = "StableDiffusionInstructPix2PixPipeline"
    models["emoji-edit"] = random_pipeline.make(tmp_path / "editor", in_channels=8, kind=kind)
    monkeypatch.setattr(loading, "PACKAGED", models)
    # test_single_file.py reads files; here one stands for the folder.
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(single_file, "read", lambda path, dtype, *more: loading.from_folder(tmp_path / "folder", dtype))
    Image.new("RGB", (70, 80), "teal").save(tmp_path / "photo.png")
    Image.new("L", (70, 80), "white").save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:the model does not know")
@pytest.mark.slow
def test_the_python_runs(here):
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "docs/text.md", "exec"), names)
    assert (here / "firefighter.png").exists()
    assert (here / "mermaids.png").exists()


def test_the_commands_run(here):
    lines = "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("fastdiff ")]
    assert len(commands) == 5
    for _, *arguments in commands:
        done = CliRunner().invoke(cli.app, [*arguments, "--steps", "2"])
        assert done.exit_code == 0, done.output
    assert {path.name for path in here.glob("*.png")} == {
        "firefighter.png", "mermaids.png", "pilot.png", "filled.png", "dark.png", "photo.png", "mask.png",
    }  # fmt: skip
