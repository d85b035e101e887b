"""Flow-GRPO's SDE against its equation as the paper writes it, its limits, and the marginals that it keeps."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import planned, spaced

import fastdiff
from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule, samplers

PREDICTIONS = {"epsilon": NoiseSchedule.linear(), "edm": EDMSchedule(), "flow_prediction": FlowSchedule(shift=3.0)}


def published(x, v, t, t_next, z, a, first):
    """x_{t+Δt} of Equation 9, with the authors' s at t = 1."""
    dt = t_next - t
    s = a * math.sqrt(t / (1 - (first if t == 1 else t)))
    return x + (v + s**2 / (2 * t) * (x + (1 - t) * v)) * dt + s * math.sqrt(-dt) * z


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("a", [0.0, 0.7, 1.5])
def test_a_flow_s_step_is_the_paper_s(seed, steps, a):
    schedule = PREDICTIONS["flow_prediction"]
    plan = samplers.flow_sde(schedule, steps, prediction="flow_prediction", noise_level=a)
    ts = [level.sigma for level in spaced(schedule, steps)]
    assert ts[0] == 1
    for i, row in enumerate(plan):
        x, v, z = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
        got = fastdiff.ops.update(x, v.float(), plan, i, noise=z).x
        v = v.float().double()
        torch.testing.assert_close(got, published(x, v, ts[i], ts[i + 1], z, a, ts[1]), rtol=1e-12, atol=1e-12)
        assert row.t == ts[i] * schedule.T
    assert plan.noisy_rows == (tuple(range(steps)) if a else ())


@pytest.mark.parametrize("kind", list(PREDICTIONS))
def test_states_of_any_process_are_a_flow_s_but_for_their_scale(seed, kind):
    """x/(α + σ) makes the paper's step at t = σ/(α + σ), v being the network's ε − x̂_0."""
    schedule, a = PREDICTIONS[kind], 0.9
    plan = samplers.flow_sde(schedule, 7, prediction=kind, noise_level=a)
    stops = spaced(schedule, 7, **({"spacing": "trailing"} if kind == "epsilon" else {}))
    for i, (here, there) in enumerate(pairwise(stops)):
        x, z = torch.randn(2, 2, 3, dtype=torch.float64)
        x0, epsilon = torch.randn(2, 2, 3, dtype=torch.float64)
        x = here.alpha * x0 + here.sigma * epsilon
        p, q = plan[i].p, plan[i].q
        m = (x0 - p * x) / q  # what a network that predicts this x̂_0 returns
        got = fastdiff.ops.update(x, m, plan, i, noise=z).x
        t, t_next = (level.sigma / (level.alpha + level.sigma) for level in (here, there))
        first = stops[1].sigma / (stops[1].alpha + stops[1].sigma)
        scaled = published(x / (here.alpha + here.sigma), epsilon - x0, t, t_next, z, a, first)
        expected = scaled * (there.alpha + there.sigma)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", list(PREDICTIONS))
def test_without_noise_it_is_ddim(kind):
    schedule = PREDICTIONS[kind]
    plan = samplers.flow_sde(schedule, 6, prediction=kind, noise_level=0)
    plain = planned(samplers.ddim, schedule, 6, prediction=kind, spacing=schedule.default_spacing)
    for mine, theirs in zip(plan, plain, strict=True):
        for term in ("x", "x0", "m"):
            assert mine.x.get(term, 0) == pytest.approx(theirs.x.get(term, 0), rel=1e-12, abs=1e-12)
        assert not mine.uses("z")


def test_a_noise_level_a_step(seed):
    """A window of noisy steps, as Flow-GRPO-Fast has; the others are DDIM's."""
    schedule = PREDICTIONS["flow_prediction"]
    plan = samplers.flow_sde(schedule, 4, prediction="flow_prediction", noise_level=(0, 0.7, 0.3, 0.0))
    assert plan.noisy_rows == (1, 2)
    for i, a in enumerate((0, 0.7, 0.3, 0)):
        assert plan[i].x == samplers.flow_sde(schedule, 4, prediction="flow_prediction", noise_level=a)[i].x
    calm = samplers.flow_sde(schedule, 4, prediction="flow_prediction", final_noise=False)
    assert calm == samplers.flow_sde(schedule, 4, prediction="flow_prediction", noise_level=(0.7, 0.7, 0.7, 0))
    with pytest.raises(ValueError, match="noise_level must be a number, or one for each of 5 steps; got 4 of them"):
        samplers.flow_sde(schedule, 5, prediction="flow_prediction", noise_level=(0, 0.7, 0.3, 0.0))
    for bad, names in ((-1, "noise_level must be finite and at least 0"), (math.nan, "noise_level"),
                       ([0.7, -1, 0, 0], r"noise_level\[1\]"), ("0.7", "noise_level must be")):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=names):
            samplers.flow_sde(schedule, 4, prediction="flow_prediction", noise_level=bad)
