"""The packaged digits model, and the measure that it is judged by."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SEED, SEED_VARIABLE

import fastdiff
from fastdiff.models import UNet
from fastdiff.training.data import load_digits
from fastdiff.training.settings import DIGITS_SAMPLING

ROOT = Path(__file__).parents[1]
PACKAGED = Path(fastdiff.__file__).parent / "assets" / "digits"


@pytest.fixture(autouse=True)
def _tell_the_seed():
    print(f"{SEED_VARIABLE}={SEED}")


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("digits_quality", ROOT / "examples" / "digits_quality.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_frechet_distance_of_gaussians(quality):
    generator = np.random.default_rng(SEED)
    features = generator.normal(size=(500, 8)) @ generator.normal(size=(8, 8))
    shift = generator.normal(size=8)
    assert quality.frechet_distance(features, features) == pytest.approx(0, abs=1e-5)
    assert quality.frechet_distance(features, features + shift) == pytest.approx(shift @ shift, rel=1e-5)
    # N(0, Σ) and N(0, 9Σ): tr(Σ + 9Σ − 6Σ), with the means apart by twice the first one.
    expected = 4 * np.trace(np.cov(features.T)) + 4 * features.mean(0) @ features.mean(0)
    assert quality.frechet_distance(features, 3 * features) == pytest.approx(expected, rel=1e-5)


def test_the_frechet_distance_survives_features_that_are_always_zero(quality):
    features = np.random.default_rng(SEED).normal(size=(50, 8)).clip(min=0)
    features[:, :3] = 0
    assert quality.frechet_distance(features, features) == pytest.approx(0, abs=1e-5)


def test_the_packaged_folder_is_small_and_tells_how_it_was_made():
    assert (PACKAGED / "diffusion_pytorch_model.safetensors").stat().st_size <= 5_000_000
    record = json.loads((PACKAGED / "training.json").read_text())
    assert record["classes"] == list("0123456789")
    assert record["settings"]["data"] == "digits"
    assert record["sampling"] == DIGITS_SAMPLING
    assert record["images"] == len(load_digits("train"))


@pytest.mark.slow
def test_the_packaged_model_draws_the_digits_that_are_asked_for():
    labels = torch.arange(60) % 10
    options = json.loads((PACKAGED / "training.json").read_text())["sampling"]
    samples = fastdiff.sample(
        UNet.from_pretrained(PACKAGED),
        (60, 1, 8, 8),
        schedule=fastdiff.NoiseSchedule.from_diffusers(PACKAGED),
        model_kwargs={"class_labels": labels},
        uncond_kwargs={"class_labels": torch.full_like(labels, 10)},
        seed=SEED,
        **options,
    )
    train = load_digits("train")
    nearest = torch.cdist(samples.flatten(1), train.images().flatten(1)).argmin(1)
    # A nearest neighbour names 97.8 % of the held-out digits rightly; 50 of 60 leaves room for any seed.
    assert int((train.labels[nearest] == labels).sum()) >= 50
    assert -1.2 < samples.min() < -0.9
    assert 0.7 < samples.max() < 1.2
