"""Euler's method for the probability-flow ODE: k-diffusion's, EDM's with churn, and flow matching's."""

from __future__ import annotations

import math
from itertools import pairwise

from fastdiff.checks import check_clip
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.stages import Churn, call, moved, timed
from fastdiff.schedules.level import Schedule, check_schedule
from fastdiff.schedules.spacing import Spacing, levels


def euler(
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
    """x' = x + (σ' − σ)(x − x̂_0)/σ (Karras et al. 2022, Algorithm 2 without its lines 9 to 11).

    A NoiseSchedule's states are x_0 + σ ε here, σ = √((1 − ᾱ)/ᾱ), the network's input x/√(1 + σ²); x_T is σ z at the
    first level, and z where ᾱ is 0 there. A FlowSchedule's are (1 − σ) x_0 + σ ε, where this is x + (σ' − σ) v.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: EDM's stochasticity: noise added before a step, in a row of its own, which
            makes no network call. The network then sees the noised state at its level, as Algorithm 2 has it
            (diffusers shows it the state before the noise).
    """
    bound, churn = check_clip(clip), Churn(s_churn, s_tmin, s_tmax, s_noise)
    schedule, quantize = check_schedule(schedule).as_ve(), Spacing.of(spacing).quantize
    stops = timed(levels(schedule, steps, spacing), quantize or not churn.s_churn)
    rows: list[Row] = []
    for here, there in pairwise(stops):
        added, here = churn.raise_noise(schedule, here, len(stops) - 1, quantize)
        rows += [*added, call(here, prediction, bound, moved(here, there.alpha, there.sigma))]
    return Plan(tuple(rows), name="euler", init_sigma=stops[0].sigma)
