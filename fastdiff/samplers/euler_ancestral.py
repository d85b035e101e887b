"""Euler ancestral sampling: a deterministic step below the next level, and noise back up to it (k-diffusion)."""

from __future__ import annotations

import math
from itertools import pairwise

from fastdiff.checks import check_clip, check_number
from fastdiff.plan.plan import Plan
from fastdiff.samplers.stages import call, moved
from fastdiff.schedules.level import Level, Schedule, check_schedule
from fastdiff.schedules.spacing import Spacing, levels


def euler_ancestral(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Plan:
    """x' = α' x̂_0 + σ_down ε + s_noise σ_up z, σ_up = η σ' √(1 − (σ' α/α' σ)²), σ_down² = σ'² − σ_up².

    On a NoiseSchedule's states x_0 + σ ε these are k-diffusion's numbers, and DDIM's with this η (Song et al. 2021,
    Equation 16) on rescaled states; a flow's follow from the same equation. η = 0 is ``euler``.

    Args:
        eta: 0 ≤ η ≤ 1. s_noise: a factor of the noise that is added, 0 or more.
    """
    bound = check_clip(clip)
    check_number("eta", eta, 0, 1)
    check_number("s_noise", s_noise, 0)
    stops = levels(check_schedule(schedule).as_ve(), steps, spacing)
    rows = []
    for here, there in pairwise(stops):
        down, up = down_and_up(here, there, eta)
        rows.append(call(here, prediction, bound, moved(here, there.alpha, down) | {"z": s_noise * up}))
    return Plan(tuple(rows), name="euler_ancestral", init_sigma=stops[0].sigma)


def down_and_up(here: Level, there: Level, eta: float) -> tuple[float, float]:
    """(σ_down, σ_up): how far a step goes, and how much noise it then adds."""
    up = eta * there.sigma * math.sqrt(1 - (there.ratio / here.ratio) ** 2)
    return math.sqrt(max(there.sigma**2 - up**2, 0.0)), up
