"""Multistep and singlestep samplers at a walk's ends: no signal, no noise, few steps, predictions that are reached."""

import itertools

import pytest
import torch
from helpers import planned, spaced
from multistep_cases import NAMES, VP
from samplers_multistep import walk

from fastdiff import samplers
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule


@pytest.mark.parametrize("name", NAMES)
def test_constant_prediction_is_reached(seed, name):
    """A network that always returns the same x_0 (ε for those that integrate ε) is followed without error."""
    noise_form = name in ("lms", "pndm", "deis", "dpm_solver_2", "dpm_solver_3")
    y = torch.randn(2, 4, dtype=torch.float64)
    plan = planned(getattr(samplers, name), VP, 7, prediction="epsilon" if noise_form else "sample", final="sigma_min")
    x = torch.randn(2, 4, dtype=torch.float64)
    noises = [torch.zeros_like(x) for _ in plan]
    *_, last = walk(plan, x, lambda x, row, i: y, noises)
    end, start = (VP.as_ve() if name == "lms" else VP).level(0), plan[0]
    if noise_form:
        exact = end.alpha / start.alpha * (x - start.sigma * y) + end.sigma * y
    else:
        # At η = 1, where the noise that z would refill is left out, e^{−h} more of the difference goes.
        share = end.ratio * start.alpha / start.sigma if any(row.uses("z") for row in plan) else 1.0
        exact = end.alpha * y + end.sigma / start.sigma * share * (x - start.alpha * y)
    torch.testing.assert_close(last, exact, rtol=1e-10, atol=1e-10)


def test_no_signal_at_the_start(seed):
    """Where ᾱ is 0 the first step is exact for x̂_0, and its output is of no use to the next step's polynomial."""
    x = torch.randn(2, 4, dtype=torch.float64)
    names = ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s", "dpmpp_sde", "dpmpp_2s_ancestral",
             "dpm_singlestep", "unipc", "lms", "pndm", "deis", "dpm_solver_2", "dpm_solver_3")  # fmt: skip
    runs = [(VP.rescale_zero_terminal_snr(), "v_prediction"), (FlowSchedule(), "flow_prediction")]
    for (schedule, prediction), name in itertools.product(runs, names):
        plan = planned(getattr(samplers, name), schedule, 6, prediction=prediction)
        z = [torch.randn(2, 4, dtype=torch.float64) for _ in plan]
        states = list(walk(plan, x, lambda x, row, i: torch.sin(x + i), z))
        # At α = 0, x is all noise: v is −x_0 and the flow's velocity x − x_0.
        x0 = -torch.sin(x) if prediction == "v_prediction" else x - torch.sin(x)
        to = spaced(schedule, 6, ve=name == "lms")[1]
        exact = to.alpha * x0 + to.sigma * (z[0] if plan[0].uses("z") else x)
        torch.testing.assert_close(states[0], exact, rtol=1e-12, atol=1e-12)
        assert all(bool(state.isfinite().all()) for state in states)
        if len(plan) == 6 and name.startswith("dpmpp"):
            assert not plan[1].uses("slot0")
            assert plan[2].uses("slot0")
    # One more with ε whose last outputs no later row reads, and the corrector that could not leave either.
    for options in ({"predict_x0": False}, {"solver_type": "bh1"}):
        plan = samplers.unipc(FlowSchedule(), 6, prediction="flow_prediction", **options)
        assert plan[1].anchor is None or not plan[1].uses("anchor")
        assert all(bool(s.isfinite().all()) for s in walk(plan, x, lambda x, row, i: torch.sin(x + i), [x] * len(plan)))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_step_ends_at_the_prediction(seed, name):
    """With final="zero" the last row's x' is its x̂_0, whatever the order, but for Adams and Bashforth's rules."""
    if name in ("lms", "pndm"):
        return
    x = torch.randn(2, 4, dtype=torch.float64)
    options = {"lower_order_final": False} if name in ("dpm_multistep", "dpmpp_2m", "dpmpp_3m", "deis", "unipc") else {}
    plan = planned(getattr(samplers, name), VP, 6, prediction="sample", **options)
    *_, last = walk(plan, x, lambda x, row, i: x * 0 + i, [x] * len(plan))
    torch.testing.assert_close(last, torch.full_like(x, len(plan) - 1.0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", [VP, EDMSchedule(), FlowSchedule()])
def test_few_steps(name, schedule):
    """A step or two are enough for every sampler, with the orders that so few allow."""
    for steps, final in itertools.product((1, 2, 3), ("zero", "sigma_min")):
        where = {"steps": steps, "final": final}
        if isinstance(schedule, EDMSchedule):
            where = {"sigmas": [80.0 / 10**i for i in range(steps)] + [0.0]}
        plan = planned(getattr(samplers, name), schedule, prediction="sample", **where)
        *_, last = walk(plan, torch.ones(1, 2, dtype=torch.float64), lambda x, row, i: x * 0.0, [torch.zeros(1, 2)] * 9)
        assert float(last.abs().max()) <= 1.0


# ---- bad input


@pytest.mark.parametrize("name", NAMES)
def test_epsilon_names_no_image_without_signal(name):
    with pytest.raises(ValueError, match="ᾱ"):
        planned(getattr(samplers, name), VP.rescale_zero_terminal_snr(), 10)
