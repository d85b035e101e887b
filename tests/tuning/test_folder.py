"""Tuned plans in a model's folder: made, known to ``models.load``, taken by name, drawn by the commands."""

import json
import warnings

import pytest
import torch
from helpers import assert_same_bits, run

import fastdiff
from fastdiff.models.trained import load
from fastdiff.tuning import folder as folder_module

QUICK = ("--images", 12, "--batch-size", 8, "--iterations", 2, "--teacher-steps", 8, "--quiet")


@pytest.fixture
def folder(tmp_path, seed):
    """A model of two classes, small and untrained."""
    unet = fastdiff.models.UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=3, null_class=2,
    )  # fmt: skip
    unet.save_pretrained(tmp_path)
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    told = {"sampling": {"sampler": "ddim", "steps": 5, "guidance_scale": 1.5}, "classes": ["a", "b"]}
    (tmp_path / "training.json").write_text(json.dumps(told))
    return tmp_path


@pytest.mark.slow
def test_the_commands(folder, tmp_path, seed):
    """`fastdiff tune` writes plans/3.json, which load knows, sampler="tuned" takes and `fastdiff sample` draws by."""
    asked = ("--plot", tmp_path / "tuned.png", "--teacher-file", tmp_path / "ends.safetensors")
    made = run("tune", "--model", folder, "--steps", 3, *QUICK, *asked)
    assert made.exit_code == 0, made.output
    assert (tmp_path / "tuned.png").stat().st_size > 1000
    wrong = run("tune", "--model", folder, "--steps", 4, *QUICK, "--seed", 1, "--teacher-file", asked[-1])
    assert (wrong.exit_code, "is of another run: its seed was 0 and is 1" in wrong.output) == (2, True), wrong.output
    trained = load(folder)
    assert list(trained.plans) == [3]
    assert "tuned for 3 steps" in repr(trained)
    labels = torch.tensor([0, 1])
    told = trained.arguments(labels, sampler="tuned", steps=3)
    plan = told["sampler"]
    assert plan == fastdiff.Plan.load(folder / "plans" / "3.json")
    assert (plan.provenance.guidance_scale, plan.provenance.shape) == (1.5, [1, 8, 8])
    assert set(told) <= {"sampler", "model_kwargs", "uncond_kwargs", "guidance_scale"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = fastdiff.sample(trained.unet, (2, 1, 8, 8), **told)
    drawn = run("sample", "--model", folder, "--sampler", "tuned", "--steps", 3, "-n", 2, "--out", tmp_path / "a.png")
    assert drawn.exit_code == 0, drawn.output
    recipe = fastdiff.read_recipe(tmp_path / "a.png")
    assert_same_bits(recipe.sample(trained.unet), images)


def test_what_a_folder_has_not(folder):
    trained = load(folder)
    with pytest.raises(ValueError, match="no tuned plan of 4 steps; it has none: fastdiff tune"):
        trained.arguments(sampler="tuned", steps=4)
    trained.plans = {5: folder / "plans" / "5.json"}
    with pytest.raises(ValueError, match="of 4 steps; it has 5:"):
        trained.arguments(sampler="tuned", steps=4)
    with pytest.raises(ValueError, match="sampler is 'tuned', a plan learned for one model"):
        fastdiff.sample(trained.unet, (1, 1, 8, 8), sampler="tuned", steps=4)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (("--out", "plan.png"), "must end in .json"),
        (("--out", "nowhere/plan.json"), "the folder nowhere does not exist"),
        (("--teacher-file", "ends.pt"), "must end in .safetensors"),
        (("--plot", "nowhere/plan.png"), "the folder nowhere does not exist"),
        (("--start", "ddpm"), "adds noise"),
        (("--class", "c"), "the model's classes are a, b"),
    ],
)
def test_asked_wrongly(folder, asked, why):
    made = run("tune", "--model", folder, "--steps", 3, *QUICK, *asked)
    assert made.exit_code == 2, made.output
    assert why in made.output


@pytest.mark.slow
def test_train_tunes_at_its_end(tmp_path, monkeypatch, seed):
    """--tune 2,3 leaves plans/2.json and plans/3.json, after the weights; a wrong one is refused before the work."""
    pytest.importorskip("sklearn")
    out = tmp_path / "model"
    asked = ("--data", "digits", "--steps", 1, "--batch-size", 2, "--channels", "8", "--quiet", "--out", out)
    wrong = run("train", *asked, "--tune", "0")
    assert (wrong.exit_code, "at least 1" in wrong.output, out.exists()) == (2, True, False)
    few = {"images": 4, "iterations": 1, "batch": 4, "teacher_steps": 4}
    whole = folder_module.tune_folder
    monkeypatch.setattr(folder_module, "tune_folder", lambda *args, **options: whole(*args, **options, **few))
    made = run("train", *asked, "--tune", "2,3")
    assert made.exit_code == 0, made.output
    assert list(load(out).plans) == [2, 3]


def test_the_packaged_digits(seed):
    """The plans in the package belong to its weights, to its shape and to its guidance."""
    trained = fastdiff.models.digits()
    assert list(trained.plans) == [3, 4, 5, 6, 8, 10]
    for steps in trained.plans:
        told = trained.arguments(torch.arange(2), sampler="tuned", steps=steps)
        assert sum(row.calls_model for row in told["sampler"]) == steps
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            images = fastdiff.sample(trained.unet, (2, 1, 8, 8), **told)
        assert bool(images.isfinite().all())
        errors = told["sampler"].provenance.errors
        assert errors["tuned"][str(steps)] < errors["start"][str(steps)]
