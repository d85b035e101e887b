"""``fastdiff reproduce``, as a user runs it after ``fastdiff sample``."""

from pathlib import Path

import pytest
import torch
from helpers import run
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastdiff import NoiseSchedule, Recipe, reproduce, samplers

SAMPLES = {
    "few": ("-n", 3, "--steps", 3),
    "batches": ("-n", 5, "--batch-size", 2, "--steps", 2, "--seed", 9, "--sample-offset", 7),
    "a class": ("-n", 2, "--steps", 2, "--class", "7", "--guidance", 3),
    "noise of its own": ("-n", 2, "--steps", 3, "--sampler", "ddpm"),
    "a dtype": ("-n", 2, "--steps", 2, "--dtype", "bfloat16"),
    "accelerated": ("-n", 2, "--steps", 2, "--accelerate", "on"),
    "an image": (
        "-n",
        3,
        "--batch-size",
        2,
        "--steps",
        6,
        "--sampler",
        "dpmpp_2m",
        "--image",
        "one.png",
        "--strength",
        0.5,
    ),
    "between two images": ("-n", 3, "--interpolate", "one.png", "two.png", "--class", "3", "--seed", 4),
    "a sampler": ("-n", 2, "--steps", 3, "--sampler", "dpmpp_2m_sde"),
}


@pytest.mark.parametrize("arguments", SAMPLES.values(), ids=SAMPLES)
def test_a_sampled_picture_is_made_again(arguments: tuple[object, ...], here: Path) -> None:
    Image.new("L", (8, 8), 90).save("one.png")
    Image.new("L", (8, 8), 200).save("two.png")
    drawn = run("sample", *arguments)
    assert drawn.exit_code == 0, drawn.output
    made = run("reproduce", "samples.png")
    assert made.exit_code == 0, made.output
    assert "samples.png: identical, to the bit" in made.output


def test_a_plan_with_options_and_its_film_are_made_again(here: Path) -> None:
    samplers.unipc(NoiseSchedule.cosine(), 4, order=3, solver_type="bh1", clip=1.0).save(here / "plan.json")
    assert run("sample", "-n", 2, "--plan", "plan.json", "--gif", "a.gif").exit_code == 0
    for name in ("samples.png", "a.gif"):
        made = run("reproduce", name)
        assert (made.exit_code, "identical, to the bit" in made.output) == (0, True), made.output


@pytest.mark.slow
def test_the_default_command_is_made_again(here: Path) -> None:
    assert run("sample").exit_code == 0
    made = run("reproduce", "samples.png")
    assert (made.exit_code, "identical, to the bit (64 images" in made.output) == (0, True), made.output


def test_another_picture_is_exit_code_1(here: Path) -> None:
    assert run("sample", "-n", 2, "--steps", 2).exit_code == 0
    with Image.open("samples.png") as picture:
        info = PngInfo()
        info.add_text("fastdiff", picture.info["fastdiff"].replace('"seed":0', '"seed":1'))
        picture.save("samples.png", pnginfo=info)
    made = run("reproduce", "samples.png")
    assert made.exit_code == 1
    assert "samples.png: not identical: " in made.output
    quiet = run("reproduce", "samples.png", "--quiet")
    assert (quiet.exit_code, quiet.output) == (1, "")


def test_threads_are_then_s_or_the_asked_number(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    sample = Recipe.sample
    monkeypatch.setattr(Recipe, "sample", lambda *a, **k: seen.append(torch.get_num_threads()) or sample(*a, **k))
    monkeypatch.setattr("os.cpu_count", lambda: before + 2)
    assert run("sample", "-n", 1, "--steps", 1, "--threads", before + 1).exit_code == 0
    for more in ((), ("--threads", before + 2), ("--threads", before + 1)):
        assert run("reproduce", "samples.png", *more).exit_code == 0
    assert seen == [before + 1, before + 1, before + 2, before + 1]
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match=r"threads must be in \[1, 4096\]; got 0"):
        reproduce("samples.png", threads=0)


def test_errors_are_one_line(here: Path) -> None:
    Image.new("L", (9, 9)).save("plain.png")
    for arguments, told in (
        (("plain.png",), "plain.png has no recipe in it"),
        (("missing.png",), "missing.png"),
        ((".",), "is a folder"),
    ):
        made = run("reproduce", *arguments)
        assert made.exit_code == 2
        assert told in made.output
        assert len(made.output.splitlines()) == 1
