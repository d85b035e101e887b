"""What the loop offers, for every sampler by its name: classifier guidance, masks, thresholding, strength, resuming."""

import inspect

import pytest
import torch
from helpers import assert_same_bits

import fastdiff
from fastdiff.samplers import SAMPLERS

SHAPE = (3, 2, 5, 7)
LINEAR = fastdiff.NoiseSchedule.linear()
STEPS = 8
EVERY = sorted(set(SAMPLERS) - {"ddim_inverse"})  # which walks the other way


def model(x, t):
    return torch.tanh(x) * (0.9 + t.to(x.dtype).view(-1, 1, 1, 1) / 5000)


def plan_of(sampler, steps=STEPS, **options):
    if "eta" in inspect.signature(SAMPLERS[sampler]).parameters and sampler != "repaint":
        options = {"eta": 0.5, **options}
    return SAMPLERS[sampler](LINEAR, steps, **options)


@pytest.mark.parametrize("sampler", EVERY)
def test_a_guided_run_is_one_whose_network_says_so(seed, sampler):
    """Algorithm 2: the run with cond_fn is the plain run of a network that returns ε̂ − σ g; its history moves too."""
    plan = plan_of(sampler)
    if any(row.variance is not None for row in plan):
        pytest.skip("DDPM's rows move their mean: tests/sampling/test_classifier_guidance.py")
    calls = iter([row for row in plan if row.calls_model])

    def gradient(x):
        return -0.05 * x / (1 + x.abs())  # smooth where x is hundreds too

    def moved(x, t):
        row = next(calls)
        return model(x, t) - row.sigma * gradient(x / row.c_in)

    options = {"sampler": plan, "seed": seed}
    got = fastdiff.sample(model, SHAPE, cond_fn=lambda x, t: gradient(x), **options)
    exact = fastdiff.sample(moved, SHAPE, **options)
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
    plain = fastdiff.sample(model, SHAPE, **options)
    assert float((got - plain).abs().max()) > 10 * float((got - exact).abs().max())


@pytest.mark.parametrize("sampler", EVERY)
def test_masks_and_thresholding(seed, sampler):
    mask, known = torch.ones(5, 7).triu() == 1, torch.rand(SHAPE) * 2 - 1
    arguments = {"sampler": plan_of(sampler), "seed": seed, "mask": mask, "known": known, "thresholding": 0.9,
                 "cond_fn": lambda x, t: -0.1 * x}  # fmt: skip
    whole = fastdiff.sample(model, SHAPE, backend="native", **arguments)
    assert_same_bits(whole, fastdiff.sample(model, SHAPE, backend="reference", **arguments))
    assert_same_bits(whole[..., mask], known[..., mask])
    assert bool(whole.isfinite().all())
    part = fastdiff.sample(model, (1, *SHAPE[1:]), sample_offset=1, **{**arguments, "known": known[1:2]})
    assert_same_bits(part, whole[1:2])
    for state in list(fastdiff.sample_iter(model, SHAPE, **arguments))[1::5]:
        assert_same_bits(fastdiff.sample(model, SHAPE, resume=state, **arguments), whole)


@pytest.mark.parametrize("sampler", EVERY)
def test_strength(seed, sampler):
    """The rows that are left begin at the level of diffusers' first timestep, noised to it, and read no history."""
    image, seen = torch.rand(SHAPE) * 2 - 1, []

    def watch(x, t):
        seen.append(int(t[0]))
        return model(x, t)

    got = fastdiff.sample(watch, SHAPE, sampler=sampler, steps=STEPS, x_init=image, strength=0.5, seed=seed)
    assert bool(got.isfinite().all())
    whole = SAMPLERS[sampler](LINEAR, STEPS)
    ts = sorted({row.t for row in whole if row.calls_model}, reverse=True)
    assert seen[0] in ts
    assert 0 < len(seen) < sum(row.calls_model for row in whole)
