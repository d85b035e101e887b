"""Denoising diffusion implicit models (Song, Meng & Ermon 2021): deterministic at η = 0, ancestral at η = 1."""

from __future__ import annotations

import math
from itertools import pairwise

from fastdiff.checks import check_clip, check_number
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.exponential import init_sigma
from fastdiff.schedules.level import Schedule, epsilon_terms, x0_terms
from fastdiff.schedules.spacing import Spacing, levels


def ddim(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> Plan:
    """x' = α' x̂_0 + √(σ'² − σ_z²) ε + σ_z z, σ_z = η σ' √(1 − (σ' α / α' σ)²) (Equations 12 and 16).

    Primes are the next level's; the last level is free of noise. The paper's CIFAR-10 numbers are of 50 and 100 steps
    that its authors' code lists as ``spacing="ddim_quadratic"``.

    Args:
        spacing: where to stop, a name or a ``Spacing``; None is leading, or the schedule's own where it has no table.
        eta: 0 ≤ η ≤ 1.
        use_clipped_model_output: take ε from the clipped x̂_0, (x − α x̂_0)/σ, rather than from the network.
    """
    check_number("eta", eta, 0, 1)
    bound = check_clip(clip)
    rows = []
    stops = levels(schedule, steps, spacing, default="leading")
    for here, there in pairwise(stops):
        p, q = x0_terms(prediction, here)
        noise = 0.0
        if here.sigma and there.alpha:
            noise = eta * there.sigma * math.sqrt(1 - (there.ratio / here.ratio) ** 2)
        if use_clipped_model_output:
            epsilon = {"x": 1 / here.sigma, "x0": -here.alpha / here.sigma} if here.sigma else {}
        else:
            epsilon = epsilon_terms(prediction, here)
        direction = math.sqrt(max(there.sigma**2 - noise**2, 0.0))
        x = {term: direction * value for term, value in epsilon.items()}
        x["x0"] = x.get("x0", 0.0) + there.alpha
        x["z"] = noise
        rows.append(Row(t=here.t, alpha=here.alpha, sigma=here.sigma, c_in=here.c_in, x=x, clip=bound, p=p, q=q))
    return Plan(tuple(rows), name="ddim", init_sigma=init_sigma(stops[0]))
