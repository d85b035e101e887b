"""Ancestral sampling of the DDPM posterior (Ho, Jain & Abbeel 2020, Algorithm 2), over all timesteps or some."""

from __future__ import annotations

import math

from fastdiff.checks import check_clip
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.exponential import init_sigma
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.level import Schedule, x0_terms
from fastdiff.schedules.spacing import Spacing, levels

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    variance: str = "fixed_small",
) -> Plan:
    """x' = √ᾱ_p β/(1 − ᾱ)·x̂_0 + √α (1 − ᾱ_p)/(1 − ᾱ)·x + σ z, with α = ᾱ/ᾱ_p, β = 1 − α (Equation 7).

    ᾱ_p belongs to the next timestep of the list and is 1 after the last, where no noise is added. States of EDM and of
    a flow are those of a table but for their scale √(α² + σ²), and have the same posterior (Kingma et al. 2021,
    Equation 22): x' is the row's of the scaled state, scaled back.

    Args:
        steps: how many timesteps to visit, all T of a NoiseSchedule by default.
        spacing: where to stop, a name or a ``Spacing``; None is leading, or the schedule's own where it has no table.
        variance: σ² = β̃ = (1 − ᾱ_p)/(1 − ᾱ)·β (fixed_small), β (fixed_large), or what the network says in a second
            half of its channels v: between the two (learned_range: Nichol & Dhariwal 2021, Equation 15), or exp(v)
            (learned, as the code of that paper has it; diffusers' "learned" is √v, which no negative v has).
    """
    if not isinstance(variance, str) or variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}; it must be one of {', '.join(VARIANCES)}")
    bound = check_clip(clip)
    *visited, end = stops = levels(schedule, steps, spacing, default="leading")
    scales = [1.0 if isinstance(schedule, NoiseSchedule) else math.hypot(level.alpha, level.sigma) for level in stops]
    bars = [(level.alpha / scale) ** 2 for level, scale in zip(visited, scales, strict=False)]
    following = [*bars[1:], (end.alpha / scales[-1]) ** 2]
    betas = [1 - bar / bar_p if bar_p else 1.0 for bar, bar_p in zip(bars, following, strict=True)]
    small = [
        (1 - bar_p) / (1 - bar) * beta if bar < 1 else 0.0
        for bar, bar_p, beta in zip(bars, following, betas, strict=True)
    ]

    rows = []
    for i, level in enumerate(visited):
        bar, bar_p, beta, last = bars[i], following[i], betas[i], i + 1 == len(visited)
        p, q = x0_terms(prediction, level)
        x = {"x": 1.0}
        if bar < 1:
            x = {
                "x0": math.sqrt(bar_p) * beta / (1 - bar),
                "x": math.sqrt(1 - beta) * (1 - bar_p) / (1 - bar),
            }
        # β̃ is 0 at the last row: where its logarithm or β is asked for, the row before's is taken, as in the published
        # code.
        floor = small[i] if not last else (small[i - 1] if i else beta)
        logs = None
        if variance == "learned_range":
            logs = (math.log(max(floor, 1e-20)), math.log(max(beta, 1e-20)))
        elif variance == "learned":
            logs = (-1.0, 1.0)  # f·log_max + (1 − f)·log_min is then v itself
        square = {"fixed_small": small[i], "fixed_large": floor if last else beta}.get(variance, 1.0)
        if not last:
            x["z"] = math.sqrt(square)
        scale = scales[i + 1]
        x = {name: value * (scale / scales[i] if name == "x" else scale) for name, value in x.items()}
        rows.append(
            Row(t=level.t, alpha=level.alpha, sigma=level.sigma, c_in=level.c_in, x=x, clip=bound, log_variance=logs,
                p=p, q=q, variance=square * scale**2)
        )  # fmt: skip
    learned = variance.startswith("learned")
    return Plan(tuple(rows), name="ddpm", init_sigma=init_sigma(stops[0]), learned_variance=learned)
