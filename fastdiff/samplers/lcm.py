"""Latent consistency models: each step jumps to x̂_0 and is noised again (Luo et al. 2023)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from fastdiff.checks import check_clip, check_int, check_number
from fastdiff.plan.plan import Plan
from fastdiff.samplers.stages import call
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.spacing import levels


def lcm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    original_inference_steps: int = 50,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    **walk: Any,
) -> Plan:
    """f = c_skip x + c_out x̂_0; x' = α' f + σ' z, which is f at the clean end (Luo et al. 2023, Algorithm 3).

    c_skip = s²/(τ² + s²), c_out = τ/√(τ² + s²), τ = timestep_scaling·t and s = sigma_data: the boundary condition
    f(x, 0) = x of consistency models (Song et al. 2023, Appendix C). ``clip`` bounds x̂_0, before c_out.

    Args:
        schedule: a NoiseSchedule. prediction, clip: as for ``ddim``.
        steps: network calls, at most original_inference_steps; None is all of them.
        original_inference_steps: the timesteps that the network was distilled on, of which the walk takes some
            (``distilled_timesteps``), unless spacing, timesteps or sigmas say otherwise.
        timestep_scaling, sigma_data: of the boundary condition, as the network was distilled.
        walk: more about the levels (``schedules.spacing.levels``).

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    check_number("timestep_scaling", timestep_scaling, 0)
    check_number("sigma_data", sigma_data, 1e-6)
    bound = check_clip(clip)
    points = distilled_levels(schedule, steps, original_inference_steps, walk)
    rows = []
    for here, there in pairwise(points):
        tau = timestep_scaling * here.t
        size = math.hypot(tau, sigma_data)
        skip, out = (sigma_data / size) ** 2, tau / size
        x = {"x0": there.alpha * out, "x": there.alpha * skip, "z": there.sigma}
        rows.append(call(here, prediction, bound, x))
    return Plan(tuple(rows), name="lcm")


def distilled_levels(schedule: NoiseSchedule, steps: int | None, original: int, walk: dict[str, Any]) -> list[Any]:
    """The levels of a distilled network's walk: its own timesteps unless ``walk`` chooses."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule; got {type(schedule).__name__}")
    if all(walk.get(name) is None for name in ("spacing", "timesteps", "sigmas")):
        walk = walk | {"timesteps": distilled_timesteps(len(schedule), steps, original)}
    return levels(schedule, steps, **walk)


def distilled_timesteps(T: int, steps: int | None, original: int) -> list[int]:
    """Of the timesteps k − 1, 2k − 1, … (k = T // original) the ones at every original/steps-th place from the top."""
    check_int("original_inference_steps", original, 1, T)
    count = original if steps is None else check_int("steps", steps, 1, original)
    # The place is rounded down in floating point, as the networks' own code has it.
    return [(original - math.floor(i * (original / count))) * (T // original) - 1 for i in range(count)]
