"""A request: arguments that are unclear are named before any work."""

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, half

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
        ({"device": "meta"}, ValueError, "device is meta"),
        ({"thresholding": 10**400}, ValueError, "ratio must be in .*; got an int of 1329 bits"),
        ({"guidance_rescale": 10**400}, ValueError, "guidance_rescale .*; got an int of 1329 bits"),
        ({"guidance_interval": (10**400, 10**401)}, ValueError, "guidance_interval must be 0 <= low < high"),
        ({"guidance_scale": [1, 2, 10**400]}, ValueError, "guidance_scale must be finite"),
        ({"model_kwargs": {1: 2}}, TypeError, "model_kwargs' names must be str; got 1"),
        ({"noise_fn": lambda stream, draw, shape: torch.zeros(shape, device="meta")}, ValueError, "noise_fn.*meta"),
        ({"mask": torch.zeros(SHAPE).to_sparse(), "known": torch.zeros(SHAPE)}, TypeError, "mask must be a dense"),
        ({"x_init": torch.full(SHAPE, 1e300, dtype=torch.float64)}, ValueError, r"x_init .*float32 has; got.* 1e\+300"),
    ],
)
def test_unclear_arguments_are_named(options, error, names):
    options = dict(options)
    with pytest.raises(error, match=names):
        fastdiff.sample(half, options.pop("shape", SHAPE), steps=3, **options)


ARRAY = np.zeros(SHAPE, dtype=np.float32)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"x_init": ARRAY}, "x_init"),
        ({"x_T": ARRAY}, "x_T"),
        ({"mask": ARRAY, "known": torch.zeros(SHAPE)}, "mask"),
        ({"mask": torch.zeros(SHAPE), "known": ARRAY}, "known"),
        ({"noise_fn": lambda stream, draw, shape: ARRAY}, "noise_fn"),
        ({"cond_fn": lambda x, t: ARRAY}, "cond_fn"),
        ({"model": lambda x, t: ARRAY}, "model"),
    ],
)
def test_an_array_is_told_from_a_tensor(options, names):
    options = {"model": half, **options}
    with pytest.raises(TypeError, match=f"{names}.* got a NumPy array; torch.from_numpy makes a tensor of it"):
        fastdiff.sample(options.pop("model"), SHAPE, steps=3, **options)


def test_an_int_beyond_float64_bounds_nothing(seed):
    for name, far, none in (("thresholding", (0.9, 10**400), 0.9), ("clip", 10**400, None)):
        a, b = (fastdiff.sample(half, SHAPE, steps=3, seed=seed, **{name: value}) for value in (far, none))
        assert_same_bits(a, b)


def test_arrays_of_numbers_are_sequences():
    seeds = fastdiff.sample(half, SHAPE, steps=3, seeds=[3, 1, 4, 1])
    assert_same_bits(fastdiff.sample(half, SHAPE, steps=np.int64(3), seeds=np.array([3, 1, 4, 1])), seeds)
    a, b = torch.rand(2, 3, 8, 8)
    mixes = fastdiff.interpolate(half, a, b, [0.0, 0.5, 1.0], t=3)
    for weights in (np.linspace(0, 1, 3), torch.linspace(0, 1, 3)):
        assert_same_bits(fastdiff.interpolate(half, a, b, weights, t=3), mixes)
    for bad in ("a", "b"):
        arguments = {"a": a, "b": b} | {bad: ARRAY[0]}
        with pytest.raises(TypeError, match=f"{bad} must be a floating-point tensor; got a NumPy array"):
            fastdiff.interpolate(half, weights=[0.5], t=3, **arguments)
