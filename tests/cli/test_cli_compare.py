"""``fastdiff compare``: the same noise by several samplers, and what is refused before any work."""

from pathlib import Path

import pytest
import torch
from helpers import run
from PIL import Image

import fastdiff
from fastdiff import NoiseSchedule, samplers
from fastdiff.cli.compare import _caption
from fastdiff.pictures.grid import make_grid
from fastdiff.plots.strips import PAD, SIZE


def test_every_place_is_what_sample_draws(here: Path) -> None:
    done = run("compare", "--samplers", "ddim,euler", "--steps", "2,3", "-n", 1, "--class", 4, "--seed", 8, "--fine", 4)
    assert done.exit_code == 0, done.output
    assert [path.name for path in here.iterdir()] == ["compare.png"]
    trained = fastdiff.models.digits()
    with Image.open("compare.png") as picture:
        for i, sampler in enumerate(("ddim", "euler")):
            for j, steps in enumerate((2, 3)):
                told = trained.arguments(torch.tensor([4]), sampler=sampler, steps=steps)
                images = fastdiff.sample(trained.unet, (1, 1, 8, 8), seed=8, **told)
                expected = make_grid(images).convert("RGB")
                top = PAD + SIZE + PAD + i * (64 + PAD + SIZE + PAD)
                row = [picture.crop((x, top, x + 64, top + 64)).tobytes() for x in range(picture.width - 63)]
                assert row.count(expected.tobytes()) == 1, (sampler, steps)
                assert (row.index(expected.tobytes()) > picture.width / 2) == (j == 1)


def test_quiet_says_nothing_and_threads_are_given_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen, sample = torch.get_num_threads(), [], fastdiff.sample
    monkeypatch.setattr(fastdiff, "sample", lambda *a, **k: seen.append(torch.get_num_threads()) or sample(*a, **k))
    done = run(
        "compare", "--samplers", "ddim", "--steps", "1,2", "-n", 1, "--fine", 0, "--quiet", "--threads", before + 1
    )
    assert (done.exit_code, done.output, [path.name for path in here.iterdir()]) == (0, "", ["compare.png"])
    assert (seen, torch.get_num_threads()) == ([before + 1] * 2, before)


def test_distances_are_told_of_samplers_without_noise() -> None:
    images = torch.ones(2, 1, 8, 8)
    for sampler, told in (("ddim", "4 calls, 0.500"), ("heun", "7 calls, 0.500"), ("ddpm", "4 calls")):
        plan = samplers.SAMPLERS[sampler](NoiseSchedule.cosine(), 4)
        assert _caption(plan, images, images - 0.5) == told
    assert _caption(plan, images, None) == "4 calls"


@pytest.mark.slow
def test_a_finer_run_is_nearer_to_the_fine_solution() -> None:
    """DPM-Solver++(2M) at 40 steps, as what others are measured against: each sampler comes nearer to it."""
    trained = fastdiff.models.digits()
    labels = torch.arange(4)

    def draw(sampler: str, steps: int) -> torch.Tensor:
        told = trained.arguments(labels, 1.0, sampler=sampler, steps=steps, spacing="trailing")
        return fastdiff.sample(trained.unet, (4, 1, 8, 8), **told)

    fine = draw("dpmpp_2m", 40)
    for sampler in ("ddim", "dpmpp_2m", "unipc"):
        coarse, finer = ((draw(sampler, steps) - fine).square().mean().sqrt() for steps in (4, 12))
        assert finer < coarse / 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--samplers", "ddim,dpmp_2m"), "did you mean 'dpmpp_2m'?"),
        (("--samplers", "ddim,"), "--samplers must be words"),
        (("--steps", "5,x"), "--steps must be whole numbers"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--steps", "5,5000"), "5000"),
        (("--class", "eleven"), "eleven"),
        (("--out", "a.jpg"), "must end in .png"),
        (("--out", "no/where.png"), "does not exist"),
        (("--model", "nowhere"), "nowhere"),
        (("--spacing", "traling"), "did you mean 'trailing'?"),
    ],
)
def test_bad_arguments_are_one_line_before_any_work(arguments: tuple[str, ...], told: str, here: Path) -> None:
    done = run("compare", *arguments)
    assert done.exit_code == 2
    assert told in done.output
    assert len(done.output.splitlines()) == 1
    assert list(here.iterdir()) == []
