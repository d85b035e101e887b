"""DPM-Solver-2's midpoint steps in σ, plain and ancestral, as k-diffusion has them."""

from __future__ import annotations

import math
from itertools import pairwise

from fastdiff.checks import check_clip, check_number
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.euler_ancestral import down_and_up
from fastdiff.samplers.stages import Churn, call, leaves_all_noise, moved, rounded, timed
from fastdiff.schedules.level import Schedule, check_schedule
from fastdiff.schedules.spacing import Spacing, levels


def dpm2(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Plan:
    """A step by the slope half-way in ln σ (Lu et al. 2022, DPM-Solver-2 with r = ½; Karras et al. 2022, Appendix C).

        first row: x' = x + (σ_m − σ)(x − x̂_0)/σ, anchor' = x, σ_m = √(σ σ')
        second row, at σ_m: x' = anchor + (σ' − σ)(x − x̂_0)/σ_m

    A last step to σ' = 0, and a first one from ᾱ = 0, is Euler's, one row. n steps are so 2n − 1 network calls (or
    2n − 2). The timestep of σ_m lies between two indices unless ``Spacing.quantize`` rounds it. Schedules, states and
    x_T are ``euler``'s.

    Args:
        steps: steps, not network calls; None visits every timestep of a NoiseSchedule.
        s_churn, s_tmin, s_tmax, s_noise: EDM's stochasticity: where s_tmin ≤ σ ≤ s_tmax, noise s_noise·√(σ̂² − σ²) is
            added before a step, σ̂ = (1 + min(s_churn/steps, √2 − 1)) σ, in a row of its own without a network call.
    """
    bound, churn = check_clip(clip), Churn(s_churn, s_tmin, s_tmax, s_noise)
    schedule, quantize = check_schedule(schedule).as_ve(), Spacing.of(spacing).quantize
    stops = timed(levels(schedule, steps, spacing), quantize)
    rows: list[Row] = []
    for here, there in pairwise(stops):
        added, here = churn.raise_noise(schedule, here, len(stops) - 1, quantize)
        if there.sigma == 0 or leaves_all_noise(here, there):
            rows += [*added, call(here, prediction, bound, moved(here, there.alpha, there.sigma))]
            continue
        middle = rounded(schedule.at(math.sqrt(here.sigma * there.sigma)), quantize)
        share = (there.sigma - here.sigma) / middle.sigma
        first = call(here, prediction, bound, moved(here, middle.alpha, middle.sigma), {"x": 1.0})
        rows += [*added, first, call(middle, prediction, bound, {"anchor": 1.0, "x": share, "x0": -share})]
    return Plan(tuple(rows), name="dpm2", init_sigma=stops[0].sigma)


def dpm2_ancestral(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Plan:
    """``dpm2``'s step to σ_down, and noise back up to σ' in its second row (k-diffusion; ``euler_ancestral``'s σs).

    A flow's step is that of x/α over σ/α, half-way in ln(σ/α). A first step from a level without signal is Euler's.

    Args:
        steps: steps, not network calls; None visits every timestep of a NoiseSchedule.
        eta: 0 ≤ η ≤ 1, the share of noise. s_noise: a factor of the noise that is added, 0 or more.
    """
    bound = check_clip(clip)
    check_number("eta", eta, 0, 1)
    check_number("s_noise", s_noise, 0)
    schedule, quantize = check_schedule(schedule).as_ve(), Spacing.of(spacing).quantize
    stops = timed(levels(schedule, steps, spacing), quantize)
    rows: list[Row] = []
    for here, there in pairwise(stops):
        down, up = down_and_up(here, there, eta)
        if down == 0 or here.alpha == 0:
            rows.append(call(here, prediction, bound, moved(here, there.alpha, down) | {"z": s_noise * up}))
            continue
        ratio = down / there.alpha
        middle = rounded(schedule.at_ratio(math.sqrt(here.ratio * ratio)), quantize)
        share = there.alpha * (ratio - here.ratio) / middle.sigma
        second = {"anchor": there.alpha / here.alpha, "x": share, "x0": -share * middle.alpha, "z": s_noise * up}
        rows += [
            call(here, prediction, bound, moved(here, middle.alpha, middle.sigma), {"x": 1.0}),
            call(middle, prediction, bound, second),
        ]
    return Plan(tuple(rows), name="dpm2_ancestral", init_sigma=stops[0].sigma)
