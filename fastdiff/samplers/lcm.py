"""Latent consistency models: each step jumps to x̂_0 and is noised again (Luo et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from fastdiff.checks import check_clip, check_int, check_number
from fastdiff.plan.plan import Plan
from fastdiff.samplers.exponential import init_sigma
from fastdiff.samplers.stages import call
from fastdiff.schedules.level import Level, Schedule, check_schedule
from fastdiff.schedules.spacing import Spacing, levels


def lcm(
    schedule: Schedule,
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
    f(x, 0) = x of consistency models (Song et al. 2023, Appendix C). ``clip`` bounds x̂_0, before c_out. Networks that
    were distilled on flows or EDM's σ bring their boundary along: there f is x̂_0 (as in diffusers' FlowMatchLCM).

    Args:
        steps: network calls, of a NoiseSchedule at most original_inference_steps; None is all of them.
        spacing: where to stop, a name or a ``Spacing``; None is the network's own timesteps.
        timestep_scaling, sigma_data: of a NoiseSchedule's boundary condition, as the network was distilled.
    """
    check_number("timestep_scaling", timestep_scaling, 0)
    check_number("sigma_data", sigma_data, 1e-6)
    bound = check_clip(clip)
    stops = distilled_levels(schedule, steps, original_inference_steps, Spacing.of(spacing))
    rows = []
    for here, there in pairwise(stops):
        tau = timestep_scaling * here.t if schedule.table_length is not None else math.inf
        size = math.hypot(tau, sigma_data)
        skip, out = (sigma_data / size) ** 2, (tau / size if math.isfinite(tau) else 1.0)
        x = {"x0": there.alpha * out, "x": there.alpha * skip, "z": there.sigma}
        rows.append(call(here, prediction, bound, x))
    return Plan(tuple(rows), name="lcm", init_sigma=init_sigma(stops[0]))


def distilled_levels(schedule: Schedule, steps: int | None, original: int, spacing: Spacing) -> list[Level]:
    """The levels that a distilled network stops at: of a table its own timesteps, unless ``spacing`` chooses."""
    T = check_schedule(schedule).table_length
    if T is not None and spacing.name is None and not spacing.lists:
        spacing = replace(spacing, timesteps=distilled_timesteps(T, steps, original))
    return levels(schedule, steps, spacing)


def distilled_timesteps(T: int, steps: int | None, original: int) -> list[int]:
    """Of the timesteps k − 1, 2k − 1, … (k = T // original) the ones at every original/steps-th place from the top."""
    check_int("original_inference_steps", original, 1, T)
    count = original if steps is None else check_int("steps", steps, 1, original)
    # The place is rounded down in floating point, as the networks' own code has it.
    return [(original - math.floor(i * (original / count))) * (T // original) - 1 for i in range(count)]
