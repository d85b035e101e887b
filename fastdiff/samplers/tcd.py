"""Trajectory consistency distillation's strategic stochastic sampling (Zheng et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from fastdiff.checks import check_clip, check_number
from fastdiff.plan.plan import Plan
from fastdiff.samplers.lcm import distilled_levels
from fastdiff.samplers.stages import call, moved
from fastdiff.schedules.level import Schedule, check_schedule
from fastdiff.schedules.spacing import Spacing


def tcd(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    eta: float = 0.3,
    original_inference_steps: int = 50,
) -> Plan:
    """A step of DDIM to s = ⌊(1 − η) t'⌋, and noise from there up to t' (Zheng et al. 2024, Algorithm 4).

    x_s = α_s x̂_0 + σ_s ε; x' = (α'/α_s) x_s + √(1 − (α'/α_s)²) z. The paper's γ is η here: 0 is deterministic, 1 is
    consistency sampling. The last step ends at index 0, without noise added, not at x̂_0 (``Spacing(final="zero")`` for
    that). On a flow s is (1 − η) t', not rounded, the noise what the level at t' lacks, and the end the image.

    Args:
        schedule: a NoiseSchedule or FlowSchedule. EDM's t is ¼ ln σ, of which s is no share.
        steps: network calls, of a NoiseSchedule at most original_inference_steps; None is all of them.
        spacing: where to stop, a name or a ``Spacing``; None is the network's own timesteps.
        eta: γ, 0 ≤ γ ≤ 1.
    """
    check_number("eta", eta, 0, 1)
    bound = check_clip(clip)
    spacing = Spacing.of(spacing)
    if not check_schedule(schedule).whole_timesteps:
        raise ValueError("tcd goes to a share (1 − η) of the next timestep, which EDM's ¼ ln σ is not: take lcm")
    table = schedule.table_length is not None
    if table and spacing.sigmas is None and spacing.final is None:
        spacing = replace(spacing, final="sigma_min")
    stops = distilled_levels(schedule, steps, original_inference_steps, spacing)
    rows = []
    for here, there in pairwise(stops):
        x = moved(here, there.alpha, there.sigma)
        if eta and there is not stops[-1]:
            # 0.7·10 must not fall below 7 by rounding.
            landing = schedule.level(math.floor((1 - eta) * there.t + 1e-6) if table else (1 - eta) * there.t)
            kept = there.alpha / landing.alpha
            square = 1 - kept**2 if table else there.sigma**2 - (kept * landing.sigma) ** 2
            x = moved(here, there.alpha, kept * landing.sigma) | {"z": math.sqrt(max(square, 0.0))}
        rows.append(call(here, prediction, bound, x))
    return Plan(tuple(rows), name="tcd")
