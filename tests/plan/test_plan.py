"""Plans: the table of their rows, guidance weights, and what a plan refuses."""

import math

import pytest
import torch

import fastdiff
from fastdiff.plan.plan import COLUMNS, Plan, Row, guidance_weights


def row(**changes) -> Row:
    return Row(**{"t": 3, "alpha": 0.5, "sigma": 0.8, "x": {"x": 1.0}, **changes})


def test_the_table():
    first = row(
        x={"x": 1.5, "z": -2.0}, p=0.25, q=-0.75, clip=1.25, scale=2.0, anchor={"anchor": 3.0}, slot={"slot1": 4.0},
        reads=(2, 0), write=3, c_in=0.3, log_variance=(-5.0, -1.0), stream=6,
    )  # fmt: skip
    last = row(t=0.5, alpha=0.9, sigma=0.4, c_in=0.7, calls_model=False)
    plan = Plan((first, last))
    table = plan.table((2.0, -1.0))
    assert table.dtype == torch.float64
    a, b = (dict(zip(COLUMNS, values, strict=True)) for values in table.tolist())
    named = {
        "t": 3, "next_c_in": 0.7, "w0": 2, "w1": -1, "w2": 0, "p": 0.25, "q": -0.75, "clip": 1.25, "scale": 2,
        "x.x": 1.5, "x.z": -2, "anchor.anchor": 3, "slot.slot1": 4, "read0": 2, "read1": 0, "read2": -1, "write": 3,
        "keeps_anchor": 1, "log_min": -5, "log_max": -1, "known_alpha": 0.9, "known_sigma": 0.4, "draw": 0,
        "stream": 6, "calls_model": 1,
    }  # fmt: skip
    assert {name: value for name, value in a.items() if value or name in named} == named
    assert (b["next_c_in"], b["known_alpha"], b["known_sigma"]) == (1, 1, 0)
    assert (b["draw"], b["stream"], b["calls_model"], b["keeps_anchor"], b["write"]) == (1, 1, 0, 0, -1)
    assert b["clip"] == math.inf
    plain = dict(zip(COLUMNS, plan.table()[0].tolist(), strict=True))
    assert (plain["w0"], plain["w1"], plain["w2"]) == (1, 0, 0)


def test_what_a_plan_knows():
    plan = Plan((row(slot={"x0": 1.0}, write=2), row(t=0, x={"slot0": 1.0}, reads=(1,)), row(t=0, anchor={"x": 1.0})))
    assert (len(plan), plan.timesteps, plan.integer_timesteps) == (3, (3, 0, 0), True)
    assert plan.slots_used == (1, 2)
    assert plan.uses_anchor
    assert plan[1].uses("slot0")
    assert not plan[0].uses("anchor")
    assert list(plan) == list(plan.rows)
    other = Plan([row(t=0.5)])
    assert (other.integer_timesteps, other.uses_anchor, other.slots_used) == (False, False, ())


def test_guidance_weights():
    for s in (0.0, 1.0, 7.5, -2.0):
        u, c = 3.0, 5.0
        w = guidance_weights(s)
        assert w[0] * u + w[1] * c == pytest.approx(u + s * (c - u))
    for s_text, s_image in ((7.5, 1.5), (1.0, 1.0)):
        e00, e0, e1 = 3.0, 5.0, 11.0
        w = guidance_weights((s_text, s_image))
        assert w[0] * e00 + w[1] * e0 + w[2] * e1 == pytest.approx(e00 + s_image * (e0 - e00) + s_text * (e1 - e0))
    for bad in (math.nan, math.inf, (1.0, math.nan), (1.0, 2.0, 3.0), ()):
        with pytest.raises(ValueError, match="guidance_scale"):
            guidance_weights(bad)


def test_a_plan_refuses():
    with pytest.raises(ValueError, match="at least one"):
        Plan(())
    with pytest.raises(TypeError, match="number 1"):
        Plan((row(), {"t": 0}))
    with pytest.raises(ValueError, match="log_variance"):
        Plan((row(x={"z": 1.0}),), learned_variance=True)


# ---- signatures, a sampler's function, and whose fault NaN is


def test_plans_compare_by_rows():
    a, b, c = (fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), n) for n in (5, 5, 6))
    assert a == b
    assert hash(a) == hash(b)
    assert a != c
    assert a != 3


def test_the_kind_of_t_says_what_the_network_is_told():
    """An int is an index, a float a time, whole or not; plans that differ in it are not the same."""
    whole, times = (Plan((Row(t=t, alpha=0.6, sigma=0.8, x={"x": 1.0}),)) for t in (3, 3.0))
    assert (whole.integer_timesteps, times.integer_timesteps) == (True, False)
    assert whole != times
    for plan in (whole, times):
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert again.integer_timesteps == plan.integer_timesteps
    mixed = Plan((*whole, *times))
    assert not mixed.integer_timesteps
