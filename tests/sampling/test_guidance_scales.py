"""A guidance scale that changes from row to row: a sequence, or a function of the level."""

import bisect

import numpy as np
import pytest
import torch
from guidance_cases import PLAN, SHAPE, Conditional, conditions
from helpers import assert_same_bits

import fastdiff

LINEAR = fastdiff.NoiseSchedule.linear()
SCALES = [4.0, 1.0, 0.0, -1.5, 2.0, 1.0]


def options(seed, **more):
    y, null = conditions()
    return {"sampler": PLAN, "seed": seed, "model_kwargs": {"y": y}, "uncond_kwargs": {"y": null}, **more}


def by_hand(plan, seed, scales, rescale=0.0):
    """Both calls in every row that makes one, in float64; ``scales`` by row. A float64 output stands for the guided."""
    y, null = conditions()
    x = fastdiff.randn(SHAPE, seed=seed).double() * plan.init_sigma
    anchor, slots = None, [None] * 4
    for i, row in enumerate(plan):
        u, c = (x * row.c_in * (0.5 + label.double().view(-1, 1, 1, 1)) for label in (null, y))
        m = u + scales[i] * (c - u)
        stds = [out.flatten(1).std(1).view(-1, 1, 1, 1) for out in (c, m)]
        m = m * (rescale * stds[0] / stds[1] + 1 - rescale)
        noise = fastdiff.randn(SHAPE, seed=seed, stream=1, draw=i).double()
        out = fastdiff.ops.update(x, m, plan, i, noise=noise, anchor=anchor, slots=slots)
        x = out.x
        anchor = anchor if out.anchor is None else out.anchor
        if row.write is not None:
            slots[row.write] = out.slot
    return x


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_one_scale_a_row(backend, seed, rescale):
    model = Conditional()
    given = options(seed, guidance_rescale=rescale)
    got = fastdiff.sample(model, SHAPE, backend=backend, guidance_scale=SCALES, **given)
    assert [len(x) for x, _, _ in model.calls] == [3 if scale == 1 else 6 for scale in SCALES]
    torch.testing.assert_close(got.double(), by_hand(PLAN, seed, SCALES, rescale), rtol=1e-5, atol=1e-5)
    for same in (tuple(SCALES), np.array(SCALES), torch.tensor(SCALES)):
        assert_same_bits(fastdiff.sample(Conditional(), SHAPE, backend=backend, guidance_scale=same, **given), got)
    states = list(fastdiff.sample_iter(Conditional(), SHAPE, backend=backend, guidance_scale=SCALES, **given))
    for state in states:
        resumed = fastdiff.sample(Conditional(), SHAPE, resume=state, backend=backend, guidance_scale=SCALES, **given)
        assert_same_bits(resumed, got)


def test_a_function_of_the_level(seed):
    """Its t, alpha, sigma and ratio σ/α are the row's; an interval leaves rows outside of it alone."""
    seen = []

    def scale(level):
        seen.append((level.t, level.alpha, level.sigma))
        return 1 + 4 * level.t / 999

    scales = [1 + 4 * row.t / 999 for row in PLAN]
    got = fastdiff.sample(Conditional(), SHAPE, guidance_scale=scale, **options(seed))
    assert seen == [(row.t, row.alpha, row.sigma) for row in PLAN]
    torch.testing.assert_close(got.double(), by_hand(PLAN, seed, scales), rtol=1e-5, atol=1e-5)
    limit = PLAN[2].sigma / PLAN[2].alpha
    got = fastdiff.sample(Conditional(), SHAPE, guidance_scale=scale, guidance_interval=(0.0, limit), **options(seed))
    inside = [1.0, 1.0, *scales[2:]]
    torch.testing.assert_close(got.double(), by_hand(PLAN, seed, inside), rtol=1e-5, atol=1e-5)


def test_equal_scales_are_one_scale(seed):
    given = options(seed)
    same = fastdiff.sample(Conditional(), SHAPE, guidance_scale=3.0, **given)
    for scale in ([3] * 6, lambda level: np.float32(3), np.float64(3.0), np.float32(3.0), torch.tensor(3.0), (3.0,)):
        assert_same_bits(fastdiff.sample(Conditional(), SHAPE, guidance_scale=scale, **given), same)
    model = Conditional()
    fastdiff.sample(model, SHAPE, guidance_scale=[1.0] * 6, **given)
    assert [len(x) for x, _, _ in model.calls] == [3] * 6
    with pytest.warns(UserWarning, match="no effect without uncond_kwargs"):
        fastdiff.sample(Conditional(), SHAPE, guidance_scale=SCALES, **{**given, "uncond_kwargs": None})


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s"])
def test_one_scale_a_step_or_a_call(seed, sampler):
    """Methods of two calls a step take either; the step's scale is that of both calls."""
    y, null = conditions()
    plan = fastdiff.samplers.SAMPLERS[sampler](LINEAR, 4)
    given = {"sampler": sampler, "steps": 4, "seed": seed, "model_kwargs": {"y": y}, "uncond_kwargs": {"y": null}}
    steps = [3.0, 2.5, 2.0, 1.5]
    of_row = [steps[bisect.bisect(plan.entries, i) - 1] for i in range(len(plan))]
    assert len(plan.entries) == 4
    for scales in (steps, of_row):
        got = fastdiff.sample(Conditional(), SHAPE, guidance_scale=scales, **given)
        torch.testing.assert_close(got.double(), by_hand(plan, seed, of_row), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"has 5 entries.* 7 of them, one a network call, or 4, one a step"):
        fastdiff.sample(Conditional(), SHAPE, guidance_scale=[1.0] * 5, **given)


def test_two_steps_and_pairs(seed):
    """A pair is two scales of two unconditional calls; of two steps with one, a scale each."""
    y, null = conditions()
    given = {"sampler": "ddim", "steps": 2, "seed": seed, "model_kwargs": {"y": y}}
    got = fastdiff.sample(Conditional(), SHAPE, guidance_scale=(3.0, 2.0), uncond_kwargs={"y": null}, **given)
    plan = fastdiff.samplers.ddim(LINEAR, 2)
    torch.testing.assert_close(got.double(), by_hand(plan, seed, [3.0, 2.0]), rtol=1e-5, atol=1e-5)
    two = {"uncond_kwargs": [{"y": null}, {"y": y / 2}], **given}
    same = fastdiff.sample(Conditional(), SHAPE, guidance_scale=(3.0, 2.0), **two)
    for pairs in ([(3.0, 2.0)] * 2, lambda level: (3.0, 2.0), np.array([[3.0, 2.0]] * 2)):
        assert_same_bits(fastdiff.sample(Conditional(), SHAPE, guidance_scale=pairs, **two), same)
    other = fastdiff.sample(Conditional(), SHAPE, guidance_scale=[(3.0, 2.0), (2.0, 1.5)], **two)
    assert not torch.equal(other, same)


def test_an_output_that_counts_for_nothing_is_not_computed(seed):
    """The first of two unconditional ones, where the second scale is 1."""
    y, null = conditions()
    given, model = {"sampler": PLAN, "seed": seed, "model_kwargs": {"y": y}}, Conditional()
    got = fastdiff.sample(
        model, SHAPE, uncond_kwargs=[{"y": null + 5}, {"y": null}], guidance_scale=(3.0, 1.0), **given
    )
    assert [len(x) for x, _, _ in model.calls] == [2 * len(y)] * len(model.calls)
    assert_same_bits(got, fastdiff.sample(Conditional(), SHAPE, uncond_kwargs={"y": null}, guidance_scale=3.0, **given))
