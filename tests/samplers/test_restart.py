"""Restart against Algorithm 1 of its paper, written out, and what it does to a walk's rows."""

import itertools
import math

import pytest
import torch
from helpers import planned
from samplers_multistep import walk

from fastdiff import FlowSchedule, NoiseSchedule, samplers
from fastdiff.schedules.continuous import EDMSchedule

EDM = EDMSchedule()
INTERVALS = ((0.05, 0.3, 3, 2), (1.0, 9.0, 2, 1))


def karras(low: float, high: float, count: int) -> list[float]:
    return [(high ** (1 / 7) + i / (count - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(count)]


def test_the_loop(seed):
    sigmas = [*karras(0.002, 80.0, 12), 0.0]
    start = torch.randn(2, 5, dtype=torch.float64) * 80
    plan = samplers.restart(EDM, 12, prediction="sample", intervals=INTERVALS, s_noise=1.1)
    noises = torch.randn(len(plan), 2, 5, dtype=torch.float64)
    *_, got = walk(plan, start, lambda x, row, i: torch.sin(x / row.c_in + math.log(row.sigma)), noises)

    drawn = iter([noises[i] for i, row in enumerate(plan) if row.uses("z")])

    def heun(x, a, b):
        def slope(x, sigma):
            return (x - torch.sin(x + math.log(sigma))) / sigma

        d = slope(x, a)
        return x + (b - a) * (d if b == 0 else (d + slope(x + (b - a) * d, b)) / 2)

    begins = {min(range(1, 12), key=lambda i, low=low: abs(sigmas[i] - low)): (high, count, times)
              for low, high, count, times in INTERVALS}  # fmt: skip
    assert len(begins) == 2
    x = start
    for i in range(12):
        x = heun(x, sigmas[i], sigmas[i + 1])
        high, count, times = begins.get(i + 1, (0, 0, 0))
        for _ in range(times):
            x = x + 1.1 * math.sqrt(high**2 - sigmas[i + 1] ** 2) * next(drawn)
            down = karras(sigmas[i + 1], high, count + 1)
            for a, b in itertools.pairwise(down):
                x = heun(x, a, b)
    assert next(drawn, None) is None
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)
    calls = sum(row.calls_model for row in plan)
    assert calls == 2 * 12 - 1 + 2 * 2 * 3 + 1 * 2 * 2


def test_the_state_s_noise_is_the_level_s():
    """Under an exact network of data at one point each row starts with the variance that it says; a flow's, too."""
    for schedule, prediction in ((EDM, "sample"), (FlowSchedule(), "sample"), (NoiseSchedule.linear(), "sample")):
        plan = samplers.restart(schedule, 14, prediction=prediction, intervals=((0.1, 0.9, None, 2),))
        assert sum(not row.calls_model for row in plan) == 2
        variance, anchor = plan[0].sigma, 0.0
        for row in plan:  # x_0 = 0: the state is its noise
            assert variance == pytest.approx(row.sigma)
            x, a, z = (row.x.get(term, 0.0) for term in ("x", "anchor", "z"))
            size = math.hypot(x * variance + a * anchor, z)
            anchor = anchor if row.anchor is None else row.anchor.get("x", 0.0) * variance
            variance = size
        assert variance == pytest.approx(0, abs=1e-9)


def test_a_coarse_walk_is_heun_s():
    """Where no level lies between the ends below t_max, nothing is restarted."""
    for where in ({"steps": 1}, {"sigmas": (80.0, 9.0, 0.5, 0.0)}):
        ours, heun = (planned(sampler, EDM, prediction="edm", **where) for sampler in (samplers.restart, samplers.heun))
        assert [row.x for row in ours] == [row.x for row in heun]


@pytest.mark.parametrize(
    ("intervals", "error", "names"),
    [
        ("0.1", TypeError, "intervals"), (3, TypeError, "intervals"), ((0.1, 0.2, 3, 1), TypeError, r"intervals\[0\]"),
        (((0.1, 0.3, 3),), TypeError, r"intervals\[0\]"), (((0.3, 0.1, 3, 1),), ValueError, "t_max"),
        (((-0.3, 0.1, 3, 1),), ValueError, "t_min"), (((0.1, 0.3, 0, 1),), ValueError, "steps"),
        (((0.1, 0.3, 3, 0),), ValueError, "K"), (((0.1, 0.3, 3.0, 1),), TypeError, "steps"),
        (((0.1, math.inf, 3, 1),), ValueError, "t_max"),
    ],
)  # fmt: skip
def test_refuses(intervals, error, names):
    with pytest.raises(error, match=names):
        samplers.restart(EDM, 12, intervals=intervals)


def test_refuses_noise():
    with pytest.raises(ValueError, match="s_noise"):
        samplers.restart(EDM, 12, s_noise=-1.0)
