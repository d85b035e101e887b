"""Image i of a seed, equal in all its bits in any batch, at any offset, of a network that promises so."""

import pytest
import torch

import fastdiff
from fastdiff.models import digits

NUMBER = 17  # of seed 42
WINDOWS = [(17, 1), (16, 2), (14, 4), (10, 8), (17, 3), (5, 13)]
OPTIONS = [
    {"sampler": "ddpm", "steps": 4},
    {"sampler": "dpmpp_2m", "steps": 3, "guidance_scale": 3.0},
    {"sampler": "ddim", "steps": 3, "guidance_scale": 3.0, "guidance_rescale": 0.7},
    {"sampler": "heun", "steps": 2, "clip": None, "thresholding": 0.9},
    {"sampler": "ddim", "steps": 4, "guidance_scale": 2.0, "guidance_interval": (0.5, 5.0)},
]


@pytest.fixture
def trained():
    trained = digits()
    fastdiff.accelerate(trained.unet, dtype=torch.float32, batch_invariant=True)
    return trained


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "guided", "rescaled", "thresholded", "interval"])
def test_one_image_in_any_batch(trained, options, rng):
    labels = torch.tensor([rng.randint(0, 9) for _ in range(32)])
    found = []
    for begin, count in WINDOWS:
        told = trained.arguments(labels[begin : begin + count], **{"guidance_scale": 1.0, **options})
        images = fastdiff.sample(trained.unet, (count, 1, 8, 8), seed=42, sample_offset=begin, **told)
        found.append(images[NUMBER - begin])
    assert all(torch.equal(image, found[0]) for image in found)


def test_from_pictures_and_step_by_step(trained, seed):
    told = trained.arguments(torch.arange(9), 1.0, sampler="ddpm", steps=4)
    x_init, mask = torch.rand(9, 1, 8, 8) * 2 - 1, torch.rand(9, 1, 8, 8) < 0.5
    whole = fastdiff.sample(
        trained.unet, (9, 1, 8, 8), seed=42, x_init=x_init, strength=0.5, mask=mask, known=x_init, **told
    )
    for begin, count in ((0, 1), (3, 2), (4, 5)):
        at = slice(begin, begin + count)
        one = trained.arguments(torch.arange(9)[at], 1.0, sampler="ddpm", steps=4)
        pictures = {"x_init": x_init[at], "mask": mask[at], "known": x_init[at]}
        *_, last = fastdiff.sample_iter(
            trained.unet, (count, 1, 8, 8), seed=42, sample_offset=begin, strength=0.5, **pictures, **one
        )
        assert torch.equal(last.x, whole[at])


def test_a_gradient_of_the_whole_batch_is_refused(trained):
    told = trained.arguments(torch.arange(2), 1.0, steps=2)
    with pytest.raises(ValueError, match="cond_fn computes a whole batch at once"):
        fastdiff.sample(trained.unet, (2, 1, 8, 8), cond_fn=lambda x, t, **more: x, **told)
