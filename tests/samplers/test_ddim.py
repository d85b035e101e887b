"""DDIM against its equation in float64, and its identities.

Its options, ends and stored numbers are DDPM's too: test_ddpm_and_ddim.py.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule, samplers
from fastdiff.plan.plan import Plan
from fastdiff.samplers import ddim
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule

LINEAR = NoiseSchedule.linear()
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def bar_at(schedule: NoiseSchedule, t: int | None) -> float:
    return 1.0 if t is None else float(schedule.alphas_cumprod[t])


def predicted(prediction: str, x: Tensor, m: Tensor, bar: float) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε) of a network's output."""
    a, s = math.sqrt(bar), math.sqrt(1 - bar)
    if prediction == "epsilon":
        return (x - s * m) / a, m
    if prediction == "v_prediction":
        return a * x - s * m, s * x + a * m
    return m, (x - a * m) / s


def ddim_formula(schedule, x, m, z, t, t_next, prediction, eta, clip, from_clipped=False):
    bar, bar_p = bar_at(schedule, t), bar_at(schedule, t_next)
    x0, epsilon = predicted(prediction, x, m, bar)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    if from_clipped:
        epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
    sigma = eta * math.sqrt((1 - bar_p) / (1 - bar) * (1 - bar / bar_p))
    return math.sqrt(bar_p) * x0 + math.sqrt(1 - bar_p - sigma**2) * epsilon + sigma * z


def rows_of(plan: Plan) -> list[int]:
    return sorted({0, 1, len(plan) // 2, len(plan) - 2, len(plan) - 1} & set(range(len(plan))))


def data(*, channels: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, channels, 4, 4, dtype=torch.float64) for _ in range(4))


GRIDS = [(None, "leading"), (50, "leading"), (7, "leading"), (1, "leading"), (50, "trailing"), (7, "trailing"),
         (13, "linspace"), (1000, "linspace"), (1, "trailing"), (333, "trailing")]  # fmt: skip


@pytest.mark.parametrize(("steps", "spacing"), GRIDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_its_equation(seed, eta, steps, spacing):
    for prediction, clip, from_clipped in itertools.product(PREDICTIONS, (None, 1.0), (False, True)):
        options = {"prediction": prediction, "clip": clip, "eta": eta, "use_clipped_model_output": from_clipped}
        plan = samplers.ddim(LINEAR, steps, spacing=spacing, **options)
        ts = [int(t) for t in plan.timesteps]
        for i in rows_of(plan):
            x, m, z, _ = data()
            m = m.float()
            t_next = ts[i + 1] if i + 1 < len(ts) else None
            got = fastdiff.ops.update(x, m, plan, i, noise=z).x
            exact = ddim_formula(LINEAR, x, m.double(), z, ts[i], t_next, prediction, eta, clip, from_clipped)
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max() + 1))


@pytest.mark.parametrize("T", [20, 1000])
def test_ddim_with_full_noise_is_ddpm(seed, T):
    """DDIM(η = 1, every step, ε from the clipped x̂_0) and DDPM with the small variance have the same rows."""
    schedule = NoiseSchedule.linear(T)
    a = samplers.ddim(schedule, T, eta=1.0, clip=1.0, use_clipped_model_output=True)
    b = samplers.ddpm(schedule, clip=1.0)
    assert a.timesteps == b.timesteps
    for i in range(T):
        assert (a[i].p, a[i].q, a[i].clip) == (b[i].p, b[i].q, b[i].clip)
        for term in ("x", "x0", "m", "z"):
            assert a[i].x.get(term, 0) == pytest.approx(b[i].x.get(term, 0), rel=1e-9, abs=1e-11), (i, term)


def test_eta_zero_reads_no_noise():
    assert not any(row.uses("z") for row in samplers.ddim(LINEAR, 50))


def test_perfect_predictions_give_the_image_back(seed):
    """With the true ε every deterministic row lands on the true path, whatever the steps."""
    x0, epsilon = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4).double()
    for steps, spacing in GRIDS:
        plan = samplers.ddim(LINEAR, steps, spacing=spacing)
        x = x0 * plan[0].alpha + epsilon * plan[0].sigma
        for i in range(len(plan)):
            out = fastdiff.ops.update(x, epsilon, plan, i, return_x0=True)
            x = out.x
            torch.testing.assert_close(out.x0, x0, rtol=0, atol=1e-9)
        torch.testing.assert_close(x, x0, rtol=0, atol=1e-9)


EDM = EDMSchedule()
FLOW = FlowSchedule()


# ---- the last level


def test_edm_starts_ddim_at_sigma_max():
    assert ddim(EDM, 5, prediction="edm", spacing="karras").init_sigma == 80
    assert ddim(FLOW, 5, prediction="flow_prediction", spacing="trailing").init_sigma == 1
    assert ddim(LINEAR, 5).init_sigma == 1
