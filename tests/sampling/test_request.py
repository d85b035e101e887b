"""A request: arguments that are unclear are named before any work."""

import pytest
import torch
from helpers import half

import fastdiff

SHAPE = (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"shape": (4,), "variance": "learned_range"}, ValueError, "learned variance"),
        ({"shape": (2, 0, 4, 4), "variance": "learned_range"}, ValueError, "learned variance"),
        ({"noise_fn": lambda stream, draw, shape: torch.zeros(shape).to_sparse()}, ValueError, "noise_fn.*dense"),
        ({"seeds": torch.zeros(4, dtype=torch.int64).to_sparse()}, TypeError, "seeds"),
        ({"seeds": torch.zeros(4, dtype=torch.int64, device="meta")}, TypeError, "seeds"),
        ({"guidance_scale": 10**400}, ValueError, "guidance_scale"),
        ({"device": 2.5}, TypeError, "device"),
        ({"device": 10**400}, ValueError, "device"),
        ({"backend": []}, TypeError, "backend"),
    ],
)
def test_unclear_arguments_are_named(options, error, names):
    options = dict(options)
    with pytest.raises(error, match=names):
        fastdiff.sample(half, options.pop("shape", SHAPE), steps=3, **options)
