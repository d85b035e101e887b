"""README.md as somebody types it: its Python runs, its commands are understood, and what it names exists."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import fastdiff
from fastdiff import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))),
)
APP = typer.main.get_command(cli.app)


def blocks(language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of its first line."""
    found = re.finditer(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def commands() -> list[list[str]]:
    """The words after ``fastdiff`` of each command in the shell blocks."""
    lines = "\n".join(text for _, text in blocks("sh")).splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [rest for first, *rest in filter(None, words) if first == "fastdiff"]


# ---- Python


class MyUNet(nn.Module):
    """A network as somebody has one, but tiny; on a machine without a GPU ``.cuda()`` leaves it where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.GroupNorm(1, 3), nn.SiLU(), nn.Conv2d(3, 3, 1)
        self.classes = nn.Embedding(11, 3)
        self.eval().requires_grad_(False)

    def cuda(self, device: Any = None) -> MyUNet:
        return super().cuda(device) if torch.cuda.is_available() else self

    def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        shown = x if class_labels is None else x + self.classes(class_labels)[:, :, None, None].to(x.dtype)
        return 0.1 * self.conv(self.act(self.norm(shown)))


def taken_for_granted() -> dict[str, Any]:
    """What README's Python has at hand: some images, labels, a mask, a loop's step, a pipeline."""
    diffusers = pytest.importorskip("diffusers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (2, 3, 8, 8)
    clean = fastdiff.randn(shape, seed=5, device=device).clamp(-1, 1)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return {
        "MyUNet": MyUNet,
        "pipe": diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).to(device),
        "schedule": fastdiff.NoiseSchedule.linear(),
        "shape": shape,
        **dict.fromkeys(("x0", "x_init", "x_T", "image"), clean),
        "mask": (clean > 0).float(),
        "a": clean[0],
        "b": clean[1],
        "t": torch.tensor([10, 900], device=device),
        "step": 3,
        "y": torch.tensor([4, 7], device=device),
        "none": torch.tensor([10, 10], device=device),
        "gradient_of_log_p": lambda x, t: -x,
    }


class Session:
    """README's Python in one namespace, from the first block on; what it printed is in ``told``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names, self.told, self.done = folder, taken_for_granted(), io.StringIO(), 0

    def run(self, given: list[tuple[int, str]], *, small: bool = True) -> None:
        """Those of the blocks that have not run; if ``small``, on 18 images of 8 × 8 pixels for 64 of 32 × 32."""
        for line, text in given[self.done :]:
            if small:
                text = re.sub(r"\b64\b", "18", text.replace("3, 32, 32)", "3, 8, 8)"))
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(self.told):
                patch.chdir(self.folder)
                exec(compile("\n" * (line - 1) + text, str(ROOT / "README.md"), "exec"), self.names)
            self.done += 1


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    pytest.importorskip("matplotlib")
    return Session(tmp_path_factory.mktemp("readme"))


@pytest.mark.parametrize("number", range(1, len(blocks("python")) + 1))
def test_a_block_of_python_runs(number, session):
    """After those before it, which have run unless this test is run alone."""
    session.run(blocks("python")[:number])


def test_what_the_python_says_and_writes(session):
    session.run(blocks("python"))
    assert session.names["images"].shape == (18, 3, 8, 8)
    assert session.names["images"].isfinite().all()
    for picture in ("samples.png", "steps.gif"):
        assert fastdiff.read_recipe(session.folder / picture) is not None
    assert "samples.png: identical, to the bit" in session.told.getvalue()
    assert "MyUNet, computing in float32" in session.told.getvalue()  # accelerate's report


@pytest.mark.slow
def test_the_first_picture_is_the_commands(tmp_path):
    """On a CPU, to which Python's model is left."""
    Session(tmp_path).run(blocks("python")[:1], small=False)
    result = CliRunner().invoke(cli.app, ["sample", "--device", "cpu", "--out", str(tmp_path / "command.png")])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "samples.png") as python, Image.open(tmp_path / "command.png") as command:
        assert python.tobytes() == command.tobytes()


def test_the_number_of_schedulers():
    pytest.importorskip("diffusers")
    from fastdiff.integrations.diffusers import SCHEDULERS

    needs_torchsde = {"DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"}
    assert f"# {len(SCHEDULERS.keys() | needs_torchsde)} schedulers" in README


# ---- the command line


def test_the_commands_are_understood(tmp_path, monkeypatch):
    """Their options are the command's, their values of the right type, and nothing that is required is missing."""
    monkeypatch.chdir(tmp_path)
    assert len(commands()) > 5
    for name, *arguments in commands():
        context = typer.Context(APP, info_name="fastdiff")
        command = APP.get_command(context, name)
        assert command is not None, name
        command.make_context(name, arguments, parent=context)  # raises a UsageError, which names the argument


def test_the_options_that_the_text_names():
    context = typer.Context(APP)
    known = {"--install-completion", "--help"}  # every command's
    for name in APP.list_commands(context):
        known |= {option for parameter in APP.get_command(context, name).params for option in parameter.opts}
    lines = [line for line in README.splitlines() if not re.match(r"(pip|python|pytest) ", line)]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
    assert len(named) > 10
    assert named <= known


def tiny_sheet(folder: Path) -> Path:
    """Pictures in place of the emoji: two subjects in two styles and three tones, some of them held out."""
    rows = [
        {"style": style, "subject": subject, "tone": tone, "subset": "emoji-240"}
        | {"caption": f"{style} style {subject} {tone}", "part": "held_out" if tone == "dark" else "train"}
        for style in ("noto", "flat") for subject in ("cook", "pilot") for tone in ("", "light", "dark")
    ]  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (2 * 64, 6 * 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "sheet.webp", lossless=True)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch):
    """As they stand, one after another in one folder, but for sizes, which come last and therefore count."""
    for library in ("sklearn", "matplotlib"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdiff.training.captioned._emoji_folder", lambda: tiny_sheet(tmp_path.parent))
    Image.new("RGB", (40, 30), (200, 100, 50)).save("photo.png")
    for folder, shift in (("photos", 0), ("samples", 3)):
        Path(folder).mkdir()
        for i in range(12):
            Image.new("RGB", (32, 32), (20 * i, 200 - 15 * i, 10 * shift + i)).save(f"{folder}/{i}.png")
    small = {
        "train digits": "--steps 2 --batch-size 4 --channels 8,8 --sampling-steps 2",
        "train emoji": "--steps 2 --batch-size 2",
        "evaluate --model": "--n 2 --seeds 0 --steps 1 --pixels-only",
        "gallery": "--quick",
        "generate": "--number 8 --batch-size 4 --steps 2",
        "sample": "--number 2",
        "tune": "--images 8 --batch-size 4 --iterations 2 --teacher-steps 8",
        "compare": "--number 1 --fine 4",
        "bench": "--steps 1 --rounds 1 --batch-size 1",
    }
    for name, *arguments in commands():
        if name == "poser" or any(word.startswith("s3://") for word in arguments):
            continue  # an extra's, and somebody's bucket
        kinds = [kind for kind in small if kind.split()[0] == name and set(kind.split()[1:]) <= set(arguments)]
        few = "--channels 16,32 --autoencoder-steps 1" if "my-emoji" in arguments[-1:] and name == "train" else ""
        more = " ".join([*(small[kind] for kind in kinds), few])
        result = CliRunner().invoke(cli.app, [name, *arguments, *more.split()])
        assert result.exit_code == 0, f"fastdiff {shlex.join([name, *arguments])}: {result.output}"
    assert {path.name for path in tmp_path.iterdir()} == {
        "photo.png", "samples.png", "plan.png", "plan.json", "compare.png", "my-digits", "seven.gif", "firefighter.png",
        "light.png",
        "pilots.png", "cook.png", "gallery", "my-emoji", "my-editor", "dark.png", "scores.json", "photos", "samples",
        "digits-50k", "tuned.json", "tuned.png",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["", *APP.list_commands(typer.Context(APP))])
def test_the_help_of_a_command(name):
    """Each argument has a sentence, which begins in upper case or with a name and ends with a full stop."""
    context = typer.Context(APP)
    command = APP.get_command(context, name) if name else APP
    assert command is not None
    assert command.help
    assert command.help.split("\n\n")[0].endswith(".")
    for parameter in command.params:
        text = re.sub(r" \[default.*\]$", "", getattr(parameter, "help", None) or "")
        assert text.endswith("."), f"{name} {parameter.name}: {text!r}"


# ---- names


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w./-])(?:fastdiff|csrc|tests|examples|benchmarks|tools|docs)/[\w/.*]*\w", text)
    for path in named:
        assert list(ROOT.glob(path)), f"{page} names {path}"


@pytest.mark.parametrize("page", PAGES)
def test_the_python_names_of_a_page_exist(page):
    for name in set(re.findall(r"(?<![\w./-])fastdiff(?:\.[A-Za-z]\w*)+", (ROOT / page).read_text(encoding="utf-8"))):
        found: Any = fastdiff
        for part in name.split(".")[1:]:
            if not hasattr(found, part) and isinstance(found, type(fastdiff)):
                try:
                    importlib.import_module(f"{found.__name__}.{part}")
                except ImportError as error:
                    if "pip install" not in str(error):
                        raise
                    pytest.skip(f"{name}: {error}")
            found = getattr(found, part)
