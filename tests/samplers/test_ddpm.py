"""DDPM against the posterior as it is derived, in float64.

Its options, ends and stored numbers are DDIM's too: test_ddpm_and_ddim.py.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule, samplers
from fastdiff.plan.plan import Plan

LINEAR = NoiseSchedule.linear()
PREDICTIONS = ("epsilon", "v_prediction", "sample")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


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


def ddpm_formula(schedule, x, m, v, z, t, t_next, prediction, variance, clip):
    """One step as the posterior q(x_p | x_t, x̂_0) is derived: two Gaussians multiplied."""
    bar, bar_p = bar_at(schedule, t), bar_at(schedule, t_next)
    x0, _ = predicted(prediction, x, m, bar)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    if t_next is None:
        return x0  # the posterior of x_0 given x_0
    alpha = bar / bar_p
    precision = alpha / (1 - alpha) + 1 / (1 - bar_p)
    mean = (math.sqrt(alpha) / (1 - alpha) * x + math.sqrt(bar_p) / (1 - bar_p) * x0) / precision
    small, large = 1 / precision, 1 - alpha
    if variance == "learned":
        return mean + z * v.exp().sqrt()
    if variance == "learned_range":
        f = (v + 1) / 2
        return mean + z * (f * math.log(large) + (1 - f) * math.log(small)).exp().sqrt()
    return mean + z * math.sqrt(small if variance == "fixed_small" else large)


def rows_of(plan: Plan) -> list[int]:
    return sorted({0, 1, len(plan) // 2, len(plan) - 2, len(plan) - 1} & set(range(len(plan))))


def data(*, channels: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, channels, 4, 4, dtype=torch.float64) for _ in range(4))


GRIDS = [(None, "leading"), (50, "leading"), (7, "leading"), (1, "leading"), (50, "trailing"), (7, "trailing"),
         (13, "linspace"), (1000, "linspace"), (1, "trailing"), (333, "trailing")]  # fmt: skip


@pytest.mark.parametrize(("steps", "spacing"), GRIDS)
@pytest.mark.parametrize("variance", [*VARIANCES, "learned"])
def test_ddpm_is_the_posterior(seed, variance, steps, spacing):
    for prediction, clip in itertools.product(PREDICTIONS, (None, 1.0)):
        plan = samplers.ddpm(LINEAR, steps, prediction=prediction, clip=clip, spacing=spacing, variance=variance)
        ts = [int(t) for t in plan.timesteps]
        for i in rows_of(plan):
            x, m, v, z = data()
            t_next = ts[i + 1] if i + 1 < len(ts) else None
            output = torch.cat([m, v], dim=1).float() if variance.startswith("learned") else m.float()
            m, v = m.float().double(), v.float().double()
            got = fastdiff.ops.update(x, output, plan, i, noise=z).x
            exact = ddpm_formula(LINEAR, x, m, v, z, ts[i], t_next, prediction, variance, clip)
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max() + 1))


@pytest.mark.parametrize("variance", VARIANCES)
def test_no_noise_in_the_last_row(variance):
    for spacing, steps in itertools.product(("leading", "trailing", "linspace"), (1, 3, None)):
        plan = samplers.ddpm(LINEAR, steps, spacing=spacing, variance=variance)
        assert not plan[-1].uses("z")
        assert all(row.uses("z") for row in plan.rows[:-1])
    plan = samplers.ddim(LINEAR, 10, eta=1.0)
    assert not plan[-1].uses("z")
    assert all(row.x["z"] > 0 for row in plan.rows[:-1])


def test_learned_variance_lies_between_the_fixed_ones(seed):
    small, large, learned = (samplers.ddpm(LINEAR, 20, variance=v) for v in VARIANCES)
    assert learned.learned_variance
    for a, b, c in list(zip(small, large, learned, strict=True))[:-1]:
        assert c.log_variance == pytest.approx((2 * math.log(a.x["z"]), 2 * math.log(b.x["z"])))
        assert c.log_variance[0] < c.log_variance[1]
