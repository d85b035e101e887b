"""``fastdiff evaluate --model``: a model whose pictures are known, and what the command refuses."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from factors import factorial
from typer.testing import CliRunner

import fastdiff
from fastdiff import cli
from fastdiff.evaluation import Judge
from fastdiff.evaluation import run as module
from fastdiff.evaluation.run import choose_targets, draw, evaluate_model
from fastdiff.training import captioned


def run(*arguments: object):
    return CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, list(map(str, arguments)))


class Perfect:
    """A pipe that draws the picture of each caption, with noise of the seed, and keeps what it was asked."""

    def __init__(self, noise: float = 0.05) -> None:
        self.data, self.noise, self.calls = factorial(), noise, []

    def __call__(self, prompts: list[str], *, seed: int, sample_offset: int, **how) -> torch.Tensor:
        self.calls.append({"prompts": prompts, "seed": seed, "sample_offset": sample_offset, **how})
        captions = [row["caption"] for row in self.data.rows]
        images = self.data.images(torch.tensor([captions.index(prompt) for prompt in prompts]))
        return images + self.noise * fastdiff.randn(images.shape, seed=seed, sample_offset=sample_offset)


class Means:
    """Features that tests can compute: the mean of each channel, and of each quarter."""

    def __init__(self, **how) -> None:
        pass

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture
def emoji(monkeypatch: pytest.MonkeyPatch) -> Perfect:
    """The small factorial in the place of the emoji, and a model that knows it."""
    pipe = Perfect()
    monkeypatch.setattr(captioned, "load_captioned", lambda data, part, subset: pipe.data)
    monkeypatch.setattr(fastdiff, "load", lambda model, device: pipe, raising=False)
    return pipe


# ---- a model


def test_targets_are_of_a_part_and_never_change() -> None:
    rows = [
        {"part": "train" if i % 4 else "held_out", "subset": "rest" if i >= 90 else "emoji-240"} for i in range(100)
    ]
    every = choose_targets(rows, "held_out", 23)
    assert every.tolist() == list(range(0, 90, 4))
    some = choose_targets(rows, "held_out", 5)
    assert some.tolist() == choose_targets(rows, "held_out", 5).tolist() == sorted(set(some.tolist()))
    assert set(some.tolist()) < set(every.tolist())
    assert len(choose_targets([{"part": "train"}] * 3, "train", 3)) == 3  # rows of no subset
    with pytest.raises(ValueError, match="n is 24, but the part 'held_out' has 23 pictures"):
        choose_targets(rows, "held_out", 24)
    with pytest.raises(ValueError, match="no picture belongs to the part 'test'; there are held_out, train"):
        choose_targets(rows, "test", 1)


def test_batches_are_drawn_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Perfect()
    captions = [row["caption"] for row in pipe.data.rows]
    together = draw(pipe, captions, 7, steps=3)
    monkeypatch.setattr(module, "_BATCH", 5)
    assert torch.equal(draw(pipe, captions, 7, steps=3), together)
    assert [(call["sample_offset"], call["steps"], len(call["prompts"])) for call in pipe.calls] == [
        (0, 3, 18), (0, 3, 5), (5, 3, 5), (10, 3, 5), (15, 3, 3)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="drew 4 pictures for 5 captions"):
        draw(lambda prompts, **how: torch.zeros(4, 3, 16, 16), captions, 0)


def test_a_model_s_scores_are_the_judge_s() -> None:
    pipe = Perfect()
    found = evaluate_model(pipe, pipe.data, part="held_out", n=6, seeds=(3, 4), network=Means(), guidance_scale=2.0)
    assert all(call["guidance_scale"] == 2.0 for call in pipe.calls)
    targets = torch.arange(1, 18, 3)
    images = draw(pipe, [pipe.data.rows[i]["caption"] for i in targets.tolist()], 4)
    expected = Judge(pipe.data.rows, pipe.data.pixels).judge(images, targets)
    second = found.scores["pooled pixels"][1]
    assert torch.equal(second.psnr, expected.psnr)
    assert torch.equal(second.nearest, targets)
    assert set(found.scores) == {"pooled pixels", "EfficientNet"}
    told = found.to_json()
    assert told["judges"]["pooled pixels"]["means"]["exact"][0] == 1
    assert told["judges"]["pooled pixels"]["seeds"][4]["psnr"] == expected.psnr.mean().item()
    assert json.loads(json.dumps(told))["distances"].keys() == {
        "samples, seed 3", "samples, seed 4", "the real ones (floor)"
    }  # fmt: skip
    assert "12 samples of 6 pictures" in str(found)


def test_distances_are_to_other_training_pictures() -> None:
    """The floor is that of the pictures asked for, to as many training pictures that were not."""
    pipe = Perfect(noise=0.0)
    found = evaluate_model(pipe, pipe.data, part="train", n=5, seeds=(0,), network=Means())
    floor, samples = found.distances["the real ones (floor)"], found.distances["samples, seed 0"]
    assert asdict(floor) == asdict(samples)
    assert (floor.n, floor.m) == (5, 5)
    assert floor.frechet > 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert evaluate_model(pipe, pipe.data, part="held_out", n=2, seeds=(0,), network=Means()).distances == {}
    assert "need more than 3 pictures" in str(caught[0].message)


def test_the_command_judges_a_model(emoji: Perfect, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    asked = ("--n", 6, "--seeds", "5,6", "--guidance", 1.5, "--sampler", "euler", "--steps", 4)
    done = run("evaluate", "--model", "emoji", *asked, "--pixels-only", "--quiet", "--out", out)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "judge: pooled pixels"
    assert lines[2].split()[:2] == ["exact", "1.000"]
    assert emoji.calls[1] | {"prompts": None} == {
        "prompts": None, "seed": 6, "sample_offset": 0, "guidance_scale": 1.5, "sampler": "euler", "steps": 4
    }  # fmt: skip
    told = json.loads(out.read_text())
    assert told["asked"] == {
        "model": "emoji", "data": "emoji", "part": "held_out", "n": 6, "seeds": [5, 6], "guidance_scale": 1.5,
        "sampler": "euler", "steps": 4,
    }  # fmt: skip
    assert told["found"]["judges"]["pooled pixels"]["means"]["exact"][0] == 1
    assert told["environment"]["torch"] == torch.__version__


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a set of pictures, --against others, or --model"),
        (("--real", "a"), "give a set of pictures, --against others, or --model"),
        (("a",), "give --against real pictures, or --save"),
        (("a", "--against", "b", "--save", "c.npz"), "give --against real pictures, or --save"),
        (("a", "--save", "c.txt"), "--save must end in .npz or .safetensors"),
        (("a", "--fake", "b"), "SET, --fake: they are two spellings of one"),
        (("a", "--against", "b", "--real", "c"), "--against, --real: they are two spellings of one"),
        (("--model", "emoji", "a"), "give a set of pictures, --against others, or --model"),
        (("--model", "emoji", "--real", "a"), "--against goes without --model"),
        (("--real", "a", "--fake", "b", "--seeds", "1"), "--seeds goes with --model"),
        (("a", "--against", "b", "--pixels-only"), "--pixels-only goes with --model"),
        (("a", "--against", "b", "--features", "inception"), "features are 'inception'"),
        (("--model", "emoji", "--size", "3"), "--size goes without --model"),
        (("--model", "emoji", "--seeds", "1,x"), "--seeds must be whole numbers"),
        (("--model", "emoji", "--seeds", "1,1"), "--seeds names one twice"),
        (("--model", "emoji", "--n", "0"), "--number"),
        (("--model", "emoji", "--out", "scores.txt"), "must end in .json"),
        (("--model", "emoji", "--pixels-only", "--n", "7"), "n is 7, but the part 'held_out' has 6 pictures"),
        (("--model", "emoji", "--pixels-only", "--part", "tset"), "no picture belongs to the part 'tset'"),
    ],
)
def test_what_is_asked_wrongly_is_told(emoji: Perfect, arguments: tuple[str, ...], message: str) -> None:
    done = run("evaluate", *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not emoji.calls


def test_data_without_factors_cannot_judge(emoji: Perfect) -> None:
    emoji.data = captioned.Captioned(emoji.data.pixels, emoji.data.captions)
    done = run("evaluate", "--model", "emoji", "--pixels-only")
    assert done.exit_code == 2
    assert "no factors to judge by" in done.stderr
