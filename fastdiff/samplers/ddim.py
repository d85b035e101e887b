"""Denoising diffusion implicit models (Song, Meng & Ermon 2021): deterministic at η = 0, ancestral at η = 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.plan import Plan, Row
from fastdiff.samplers.timesteps import check_clip, epsilon_terms, select, x0_terms
from fastdiff.schedule import NoiseSchedule


def ddim(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str = "leading",
    timesteps: Sequence[int] | None = None,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> Plan:
    """x' = √ᾱ_p x̂_0 + √(1 − ᾱ_p − σ²) ε + σ z, σ = η √((1 − ᾱ_p)/(1 − ᾱ)) √(1 − ᾱ/ᾱ_p) (Equations 12 and 16).

    ᾱ_p belongs to the next timestep of the list and is 1 after the last.

    Args:
        schedule, steps, prediction, clip, spacing, timesteps: as for ``ddpm``.
        eta: 0 ≤ η ≤ 1.
        use_clipped_model_output: take ε from the clipped x̂_0, (x − √ᾱ x̂_0)/√(1 − ᾱ), rather than from the network.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    if isinstance(eta, bool) or not isinstance(eta, (int, float)):
        raise TypeError(f"eta must be a number; got {type(eta).__name__}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1]; got {eta}")
    chosen = select(schedule, steps, spacing, timesteps)
    bound = check_clip(clip)
    bars = schedule.alphas_cumprod[chosen].tolist()

    rows = []
    for t, bar, bar_p in zip(chosen, bars, [*bars[1:], 1.0], strict=True):
        alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
        p, q = x0_terms(prediction, alpha, sigma)
        noise = 0.0
        if bar < 1 and bar_p > 0:
            noise = eta * math.sqrt((1 - bar_p) / (1 - bar)) * math.sqrt(1 - bar / bar_p)
        if use_clipped_model_output:
            epsilon = {"x": 1 / sigma, "x0": -alpha / sigma} if sigma else {}
        else:
            epsilon = epsilon_terms(prediction, alpha, sigma)
        direction = math.sqrt(max(1 - bar_p - noise**2, 0.0))
        x = {term: direction * value for term, value in epsilon.items()}
        x["x0"] = x.get("x0", 0.0) + math.sqrt(bar_p)
        x["z"] = noise
        rows.append(Row(t=t, alpha=alpha, sigma=sigma, x=x, clip=bound, p=p, q=q))
    return Plan(tuple(rows), name="ddim")
