"""Latent consistency models: each step jumps to x̂_0 and is noised again (Luo et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from fastdiff.checks import check_clip, check_int, check_number
from fastdiff.plan.plan import Plan
from fastdiff.samplers.stages import call
from fastdiff.schedules.discrete import NoiseSchedule, check_table
from fastdiff.schedules.level import Level
from fastdiff.schedules.spacing import Spacing, levels


def lcm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    original_inference_steps: int = 50,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> Plan:
    """f = c_skip x + c_out x̂_0; x' = α' f + σ' z, which is f at the clean end (Luo et al. 2023, Algorithm 3).

    c_skip = s²/(τ² + s²), c_out = τ/√(τ² + s²), τ = timestep_scaling·t and s = sigma_data: the boundary condition
    f(x, 0) = x of consistency models (Song et al. 2023, Appendix C). ``clip`` bounds x̂_0, before c_out.

    Args:
        schedule: a NoiseSchedule.
        steps: network calls, at most original_inference_steps; None is all of them.
        prediction: what the network predicts (``schedules.level.x0_terms``). clip: the bound of |x̂_0|, None for none.
        spacing: where to stop, a name or a ``Spacing``; None is the network's own timesteps.
        original_inference_steps: the timesteps that the network was distilled on, of which some are visited
            (``lcm.distilled_timesteps``), unless ``spacing`` says otherwise.
        timestep_scaling, sigma_data: of the boundary condition, as the network was distilled.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    check_number("timestep_scaling", timestep_scaling, 0)
    check_number("sigma_data", sigma_data, 1e-6)
    bound = check_clip(clip)
    stops = distilled_levels(schedule, steps, original_inference_steps, Spacing.of(spacing))
    rows = []
    for here, there in pairwise(stops):
        tau = timestep_scaling * here.t
        size = math.hypot(tau, sigma_data)
        skip, out = (sigma_data / size) ** 2, tau / size
        x = {"x0": there.alpha * out, "x": there.alpha * skip, "z": there.sigma}
        rows.append(call(here, prediction, bound, x))
    return Plan(tuple(rows), name="lcm")


def distilled_levels(schedule: NoiseSchedule, steps: int | None, original: int, spacing: Spacing) -> list[Level]:
    """The levels that a distilled network stops at: its own timesteps unless ``spacing`` chooses."""
    check_table(schedule)
    if spacing.name is None and not spacing.lists:
        spacing = replace(spacing, timesteps=distilled_timesteps(len(schedule), steps, original))
    return levels(schedule, steps, spacing)


def distilled_timesteps(T: int, steps: int | None, original: int) -> list[int]:
    """Of the timesteps k − 1, 2k − 1, … (k = T // original) the ones at every original/steps-th place from the top."""
    check_int("original_inference_steps", original, 1, T)
    count = original if steps is None else check_int("steps", steps, 1, original)
    # The place is rounded down in floating point, as the networks' own code has it.
    return [(original - math.floor(i * (original / count))) * (T // original) - 1 for i in range(count)]
