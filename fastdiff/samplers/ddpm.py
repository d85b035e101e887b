"""Ancestral sampling of the DDPM posterior (Ho, Jain & Abbeel 2020, Algorithm 2), over all timesteps or some."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.plan import Plan, Row
from fastdiff.samplers.timesteps import check_clip, select, x0_terms
from fastdiff.schedule import NoiseSchedule

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def ddpm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str = "leading",
    timesteps: Sequence[int] | None = None,
    variance: str = "fixed_small",
) -> Plan:
    """x' = √ᾱ_p β/(1 − ᾱ)·x̂_0 + √α (1 − ᾱ_p)/(1 − ᾱ)·x + σ z, with α = ᾱ/ᾱ_p, β = 1 − α (Equation 7).

    ᾱ_p belongs to the next timestep of the list and is 1 after the last, where no noise is added.

    Args:
        schedule: the noise schedule, T steps.
        steps: how many timesteps to visit, all T by default.
        prediction: epsilon, v_prediction or sample.
        clip: the bound of |x̂_0|, None for none.
        spacing, timesteps: which timesteps (``timesteps.select``).
        variance: σ² = β̃ = (1 − ᾱ_p)/(1 − ᾱ)·β (fixed_small), β (fixed_large), or between the two as the network says
            (learned_range: Nichol & Dhariwal 2021, Equation 15; the network returns twice the channels).

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}; it must be one of {', '.join(VARIANCES)}")
    chosen = select(schedule, steps, spacing, timesteps)
    bound = check_clip(clip)
    bars = schedule.alphas_cumprod[chosen].tolist()
    following = [*bars[1:], 1.0]
    betas = [1 - bar / bar_p if bar_p else 1.0 for bar, bar_p in zip(bars, following, strict=True)]
    small = [
        (1 - bar_p) / (1 - bar) * beta if bar < 1 else 0.0
        for bar, bar_p, beta in zip(bars, following, betas, strict=True)
    ]

    rows = []
    for i, t in enumerate(chosen):
        bar, bar_p, beta, last = bars[i], following[i], betas[i], i + 1 == len(chosen)
        alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
        p, q = x0_terms(prediction, alpha, sigma)
        x = {"x": 1.0}
        if bar < 1:
            x = {
                "x0": math.sqrt(bar_p) * beta / (1 - bar),
                "x": math.sqrt(1 - beta) * (1 - bar_p) / (1 - bar),
            }
        if not last:
            x["z"] = {"fixed_small": math.sqrt(small[i]), "fixed_large": math.sqrt(beta), "learned_range": 1.0}[
                variance
            ]
        logs = None
        if variance == "learned_range":
            # β̃ is 0 at the last row: its logarithm is taken from the row before, as in the published code.
            floor = small[i] if not last else (small[i - 1] if i else beta)
            logs = (math.log(max(floor, 1e-20)), math.log(max(beta, 1e-20)))
        rows.append(Row(t=t, alpha=alpha, sigma=sigma, x=x, clip=bound, log_variance=logs, p=p, q=q))
    return Plan(tuple(rows), name="ddpm", learned_variance=variance == "learned_range")
