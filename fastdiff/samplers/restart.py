"""Restart sampling: Heun's method that goes back up in noise within an interval, again and again (Xu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fastdiff.checks import check_clip, check_int, check_number
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.stages import heun_rows, noised, rounded, timed
from fastdiff.schedules.level import Level, Schedule, check_schedule
from fastdiff.schedules.spacing import Spacing, levels

Interval = tuple[float, float, int | None, int]


def restart(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    intervals: Sequence[Interval] = ((0.06, 0.3, 3, 2),),
    s_noise: float = 1.0,
) -> Plan:
    """``heun`` and, where it reaches an interval's low end t_min, K times: noise back up to t_max, Heun down again.

    The noise is that of the forward process, x ← (α_max/α_min) x + √(σ_max² − (α_max/α_min)² σ_min²) z (Xu et al. 2023,
    Equation 4, Algorithm 1), in a row of its own without a network call: it contracts the errors that the walk has
    gathered, which the ODE alone would keep. The way down has ``steps`` of Karras et al. 2022, Equation 5, between
    t_max and the walk's own level nearest to t_min.

    An interval begins at a level between the walk's first and last that lies below its t_max; a walk too coarse to have
    one is ``heun``'s. n steps are 2n − 1 network calls, and 2·steps more for each restart.

    Args:
        steps: steps, not network calls; None visits every timestep of a NoiseSchedule.
        intervals: (t_min, t_max, steps, K) of each, t in σ/α; steps None is as many as the walk itself has there. The
            default is the paper's for CIFAR-10, whose code counts levels in place of steps, one more.
        s_noise: a factor of the noise, 0 or more.
    """
    check_number("s_noise", s_noise, 0)
    if isinstance(intervals, str) or not isinstance(intervals, Sequence):
        raise TypeError(f"intervals must be a sequence of (t_min, t_max, steps, K); got {type(intervals).__name__}")
    bound, wanted = check_clip(clip), [_interval(i, given) for i, given in enumerate(intervals)]
    schedule, quantize = check_schedule(schedule).as_ve(), Spacing.of(spacing).quantize
    stops = timed(levels(schedule, steps, spacing), quantize)
    begins: dict[int, list[Interval]] = {}
    for interval in wanted:
        inner = range(1, len(stops) - 1)
        nearest = min(inner, key=lambda i: abs(stops[i].ratio - interval[0]), default=0)
        if nearest and stops[nearest].ratio < interval[1] and stops[nearest].alpha:
            begins.setdefault(nearest, []).append(interval)
    rows: list[Row] = []
    for i, (here, there) in enumerate(pairwise(stops), start=1):
        rows += heun_rows(here, there, prediction, bound)
        for _, high, count, times in begins.get(i, ()):
            if count is None:
                count = 1 + sum(there.ratio < stop.ratio < high for stop in stops)
            walk = _between(schedule, there, high, count, quantize)
            for _ in range(times):
                rows.append(noised(there, walk[0], s_noise))
                for a, b in pairwise(walk):
                    rows += heun_rows(a, b, prediction, bound)
    return Plan(tuple(rows), name="restart", init_sigma=stops[0].sigma)


def _between(schedule: Schedule, low: Level, high: float, count: int, quantize: bool) -> list[Level]:
    """``count`` steps from σ/α = high to a level of the walk, by Karras et al. 2022, Equation 5, with their ρ = 7."""
    a, b = high ** (1 / 7), low.ratio ** (1 / 7)
    inner = [(a + i / count * (b - a)) ** 7 for i in range(1, count)]
    return [*(rounded(schedule.at_ratio(ratio), quantize) for ratio in (high, *inner)), low]


def _interval(i: int, given: Interval) -> Interval:
    name = f"intervals[{i}]"
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 4:
        raise TypeError(f"{name} must be (t_min, t_max, steps, K); got {given!r}")
    low, high, steps, times = given
    check_number(f"{name}'s t_min", low, 0)
    if not check_number(f"{name}'s t_max", high, 0) > low:
        raise ValueError(f"{name}'s t_max must be above its t_min; got {low} and {high}")
    count = None if steps is None else check_int(f"{name}'s steps", steps, 1, 1 << 20)
    return float(low), float(high), count, check_int(f"{name}'s K", times, 1, 1 << 20)
