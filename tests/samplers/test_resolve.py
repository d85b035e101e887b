"""From a sampler's name or function and its options to its plan."""

import pytest
import torch
from helpers import assert_same_bits, half

import fastdiff

SHAPE = (4, 3, 8, 8)


def test_a_function_is_a_sampler(seed):
    given = []

    def mine(schedule, steps, *, clip=None, spacing=None):
        given.append((schedule, steps, clip, spacing))
        return fastdiff.samplers.ddim(schedule, steps, clip=clip, spacing=spacing)

    got = fastdiff.sample(half, SHAPE, sampler=mine, steps=4, clip=1.0, seed=seed, sampler_options={"skip": 1})
    assert given == [(fastdiff.NoiseSchedule.linear(), 4, 1.0, fastdiff.Spacing(skip=1))]
    same = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 4, clip=1.0, spacing=fastdiff.Spacing(skip=1))
    assert_same_bits(got, fastdiff.sample(half, SHAPE, sampler=same, seed=seed))
    with pytest.raises(ValueError, match="mine does not take prediction; it takes clip, spacing"):
        fastdiff.sample(half, SHAPE, sampler=mine, steps=4, prediction="sample")
    with pytest.raises(TypeError, match="must return a Plan"):
        fastdiff.sample(half, SHAPE, sampler=lambda schedule, steps: 3, steps=4)
    with pytest.raises(ValueError, match=r"'heun' does not take order; it takes prediction, .*s_churn.*timesteps"):
        fastdiff.sample(half, SHAPE, sampler="heun", steps=4, sampler_options={"order": 2})
    with pytest.raises(TypeError, match="names must be str"):
        fastdiff.sample(half, SHAPE, steps=4, sampler_options={1: 2})


def test_options_of_a_spacing():
    """A field of ``Spacing`` beside the sampler's own options, or in a Spacing: the same plan."""
    options = {"steps": 6, "sampler": "dpmpp_2m", "seed": 1}
    karras = fastdiff.Spacing("karras", rho=5.0, final="sigma_min")
    a = fastdiff.sample(half, SHAPE, spacing=karras, **options)
    b = fastdiff.sample(half, SHAPE, spacing="karras", sampler_options={"rho": 5.0, "final": "sigma_min"}, **options)
    assert_same_bits(a, b)
    with pytest.raises(ValueError, match="rho is given twice"):
        fastdiff.sample(half, SHAPE, spacing=karras, sampler_options={"rho": 3.0}, **options)
    with pytest.raises(ValueError, match="strength leaves out"):
        fastdiff.sample(
            half, SHAPE, spacing=fastdiff.Spacing(skip=2), x_init=torch.zeros(SHAPE), strength=0.5, **options
        )
