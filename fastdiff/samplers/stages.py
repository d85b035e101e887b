"""What the one- and two-stage samplers share: a step along the probability-flow ODE, and EDM's churn.

With ε = (x − α x̂_0)/σ, a step that holds x̂_0 and ε goes from (α, σ) to α' x̂_0 + σ' ε. On the straight lines of VE
states (α = 1) and of a flow (α = 1 − σ) this is Euler's method for dx/dσ = (x − x̂_0)/σ (Karras et al. 2022, Equation 3;
Lipman et al. 2023), and a second-order method for the one is a second-order method for the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastdiff.checks import check_number
from fastdiff.plan.row import Row
from fastdiff.schedules.level import Level, Schedule, x0_terms


def moved(here: Level, alpha: float, sigma: float) -> dict[str, float]:
    """α' x̂_0 + σ' ε in the terms x and x̂_0."""
    share = sigma / here.sigma
    return {"x": share, "x0": alpha - here.alpha * share}


def call(
    here: Level, prediction: str, clip: float, x: Mapping[str, float], anchor: Mapping[str, float] | None = None
) -> Row:
    """A row that calls the network at a level."""
    p, q = x0_terms(prediction, here)
    return Row(
        t=here.t, alpha=here.alpha, sigma=here.sigma, c_in=here.c_in, p=p, q=q, clip=clip, x=x, anchor=anchor
    )  # fmt: skip


def rounded(level: Level, quantize: bool) -> Level:
    """A level between a spacing's stops, its timestep rounded to a whole number where theirs are."""
    return replace(level, t=round(level.t)) if quantize else level


def timed(stops: Sequence[Level], quantize: bool) -> list[Level]:
    """The stops of a sampler that also calls the network between them: its t is float32 in one step, too."""
    return list(stops) if quantize else [replace(level, t=float(level.t)) for level in stops]


def leaves_all_noise(here: Level, there: Level) -> bool:
    """Whether a step leads from ᾱ = 0, where the state is ε alone, to states x_0 + σ ε: one of first order."""
    return here.alpha == 0 and there.alpha == 1


def heun_rows(here: Level, there: Level, prediction: str, clip: float) -> list[Row]:
    """Heun's step (``heun``): two rows, or Euler's one where it ends without noise or leaves a level without signal."""
    first = moved(here, there.alpha, there.sigma)
    if there.sigma == 0 or leaves_all_noise(here, there):
        return [call(here, prediction, clip, first)]
    half = (there.sigma - here.sigma) / 2
    anchor = {"x": 1 + half / here.sigma, "x0": -half / here.sigma}
    second = {"anchor": 1.0, "x": half / there.sigma, "x0": -half / there.sigma}
    return [call(here, prediction, clip, first, anchor), call(there, prediction, clip, second)]


def noised(low: Level | Row, high: Level | Row, s_noise: float = 1.0) -> Row:
    """The row, without a network call, from a level (or the one that a row starts at) to a noisier one."""
    ratio = high.alpha / low.alpha
    noise = s_noise * math.sqrt(high.sigma**2 - (ratio * low.sigma) ** 2)
    return Row(t=low.t, alpha=low.alpha, sigma=low.sigma, c_in=low.c_in, x={"x": ratio, "z": noise}, calls_model=False)


@dataclass(frozen=True)
class Churn:
    """Noise added before a step (Karras et al. 2022, Algorithm 2, lines 4 to 6), in σ/α, for a flow too.

    γ = min(s_churn/steps, √2 − 1) where s_tmin ≤ σ ≤ s_tmax; σ̂ = (1 + γ) σ; x̂ = x + s_noise √(σ̂² − σ²) z. None is
    added where the state is noise alone.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_noise"):
            check_number(name, getattr(self, name), 0)
        check_number("s_tmax", self.s_tmax, self.s_tmin, math.inf)

    def raise_noise(self, schedule: Schedule, here: Level, steps: int, quantize: bool) -> tuple[list[Row], Level]:
        """The row that adds the noise, without a network call, and the level after it; no row where none is added."""
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1)
        if gamma == 0 or not self.s_tmin <= here.ratio <= self.s_tmax or here.ratio == math.inf:
            return [], here
        ratio = here.ratio * (1 + gamma)
        there = rounded(schedule.at_ratio(ratio), quantize)
        noise = self.s_noise * there.alpha * math.sqrt(ratio**2 - here.ratio**2)
        x = {"x": there.alpha / here.alpha, "z": noise}
        return [Row(t=here.t, alpha=here.alpha, sigma=here.sigma, c_in=here.c_in, x=x, calls_model=False)], there
