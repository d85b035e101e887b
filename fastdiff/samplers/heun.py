"""Heun's method for the probability-flow ODE: EDM's sampler, deterministic or with churn, and flow matching's."""

from __future__ import annotations

import math
from itertools import pairwise

from fastdiff.checks import check_clip
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.stages import Churn, heun_rows, timed
from fastdiff.schedules.level import Schedule, check_schedule
from fastdiff.schedules.spacing import Spacing, levels


def heun(
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
    """Euler's step to σ', and from the start again with the mean of both slopes (Karras et al. 2022, Algorithm 2).

        d = (x − x̂_0)/σ, h = σ' − σ:   x' = x + h d, anchor' = x + (h/2) d
        then, at σ':                    x' = anchor + (h/2)(x − x̂_0)/σ'

    The anchor holds all that the second row needs of the first, so no slot is written. A last step to σ' = 0, and a
    first one from ᾱ = 0, is Euler's, one row. n steps are so 2n − 1 network calls (or 2n − 2). Schedules, states and
    x_T are ``euler``'s.

    Args:
        steps: steps, not network calls; None visits every timestep of a NoiseSchedule.
        s_churn, s_tmin, s_tmax, s_noise: EDM's stochasticity: where s_tmin ≤ σ ≤ s_tmax, noise s_noise·√(σ̂² − σ²) is
            added before a step, σ̂ = (1 + min(s_churn/steps, √2 − 1)) σ, in a row of its own without a network call.
    """
    bound, churn = check_clip(clip), Churn(s_churn, s_tmin, s_tmax, s_noise)
    schedule, quantize = check_schedule(schedule).as_ve(), Spacing.of(spacing).quantize
    stops = timed(levels(schedule, steps, spacing), quantize or not churn.s_churn)
    rows: list[Row] = []
    for here, there in pairwise(stops):
        added, here = churn.raise_noise(schedule, here, len(stops) - 1, quantize)
        rows += [*added, *heun_rows(here, there, prediction, bound)]
    return Plan(tuple(rows), name="heun", init_sigma=stops[0].sigma)
