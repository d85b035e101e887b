"""Flow matching with noise: the SDE of Flow-GRPO (Liu et al. 2025), whose steps have a density to learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from fastdiff.checks import check_clip, check_number
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.exponential import blend, init_sigma
from fastdiff.schedules.level import Level, Schedule, epsilon_terms, x0_terms
from fastdiff.schedules.spacing import Spacing, levels


def flow_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    noise_level: float | Sequence[float] = 0.7,
    final_noise: bool = True,
) -> Plan:
    """x' = x + [v + s²/2t (x + (1 − t) v)] Δt + s √|Δt| z, s = a √(t/(1 − t)), v = ε − x̂_0 (Liu et al. 2025, Eq. 9).

    t is a flow's σ, and Δt < 0 leads to the next; with x + (1 − t) v = ε, and d = a²|Δt|/(1 − t), the step is
    (1 − t') x̂_0 + (t' − d/2) ε + √(d t) z. At t = 1, where s is infinite, 1 − t is taken at the next t, as in the
    authors' code. States of a table or of EDM, divided by α + σ, are a flow's at t = σ/(α + σ): the step is that of the
    scaled state, scaled back.

    Args:
        noise_level: a ≥ 0, in the paper 0.7, or one a step. Steps of 0 are ``ddim``'s.
        final_noise: whether the last step draws too, as the authors' training has it: that noise stays in the image.
    """
    bound = check_clip(clip)
    stops = levels(schedule, steps, spacing)
    count = len(stops) - 1
    noise_levels = _noise_levels(noise_level, count)
    if not final_noise:
        noise_levels[-1] = 0.0
    rows = []
    for (here, there), a in zip(pairwise(stops), noise_levels, strict=True):
        p, q = x0_terms(prediction, here)
        t, t_next = _time(here), _time(there)
        d = a**2 * (t - t_next) / (1 - (t if t < 1 else t_next))
        scale = there.alpha + there.sigma
        x = blend(
            (there.alpha, {"x0": 1.0}),
            (scale * (t_next - d / 2), epsilon_terms(prediction, here)),
            (scale * math.sqrt(d * t), {"z": 1.0}),
        )
        rows.append(Row(t=here.t, alpha=here.alpha, sigma=here.sigma, c_in=here.c_in, x=x, clip=bound, p=p, q=q))
    return Plan(tuple(rows), name="flow_sde", init_sigma=init_sigma(stops[0]))


def _time(level: Level) -> float:
    """Where a flow's line has the level."""
    return level.sigma / (level.alpha + level.sigma)


def _noise_levels(noise_level: float | Sequence[float], count: int) -> list[float]:
    """One a step."""
    several = isinstance(noise_level, Sequence) and not isinstance(noise_level, str)
    given: list[float] = list(noise_level) if isinstance(noise_level, Sequence) else [noise_level] * count
    if several and len(given) != count:
        raise ValueError(f"noise_level must be a number, or one for each of {count} steps; got {len(given)} of them")
    return [check_number(f"noise_level[{i}]" if several else "noise_level", a, 0) for i, a in enumerate(given)]
