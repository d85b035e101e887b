"""How fast every sampler converges, measured where the answer is known: a mixture of Gaussians on the line.

    python examples/convergence.py [--out docs]

The score of the mixture is exact at every level, and so is the solution of its probability-flow ODE: in one dimension
the flow keeps every point's quantile. So an error needs no other solver to be measured against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule, Plan, Row
from fastdiff.samplers import SAMPLERS
from fastdiff.samplers.spacing import Schedule

Array = NDArray[np.float64]
STEPS = (10, 20, 40, 80, 160, 320, 640)
FITTED = (1e-11, 1e-2)  # errors outside are rounding, or not yet asymptotic


# ---- the target


@dataclass(frozen=True)
class Mixture:
    """Σ weight·N(mean, deviation²), and what becomes of it at x = alpha·x_0 + sigma·ε: a mixture again."""

    weights: Array = field(default_factory=lambda: np.array([0.45, 0.55])[:, None])
    means: Array = field(default_factory=lambda: np.array([-1.0, 0.9])[:, None])
    deviations: Array = field(default_factory=lambda: np.array([0.5, 0.6])[:, None])

    def _parts(self, x: Array, alpha: float, sigma: float) -> tuple[Array, Array, Array]:
        """Each component's share of the density at x, x's distance from its mean, its variance."""
        variance = (alpha * self.deviations) ** 2 + sigma**2
        distance = x - alpha * self.means
        density = self.weights / np.sqrt(variance) * np.exp(-0.5 * distance**2 / variance)
        return density, distance, variance

    def predict(self, x: Array, alpha: float, sigma: float) -> tuple[Array, Array]:
        """(E[x_0 | x], E[ε | x]), neither by way of the other."""
        density, distance, variance = self._parts(x, alpha, sigma)
        share = density / density.sum(0)
        pull = distance / variance
        return (share * (self.means + alpha * self.deviations**2 * pull)).sum(0), (share * sigma * pull).sum(0)

    def quantiles(self, u: Array, alpha: float, sigma: float) -> Array:
        """The x below which a share u of the states at a level lies: the flow's solution for the point of quantile u."""
        variance = (alpha * self.deviations) ** 2 + sigma**2
        low = (alpha * self.means - 9 * np.sqrt(variance)).min() * np.ones_like(u)
        high = (alpha * self.means + 9 * np.sqrt(variance)).max() * np.ones_like(u)
        x = 0.5 * (low + high)
        for _ in range(200):  # Newton, with bisection where it would leave the bracket
            density, distance, _v = self._parts(x, alpha, sigma)
            excess = (self.weights * _normal_cdf(distance / np.sqrt(variance))).sum(0) - u
            low, high = np.where(excess < 0, x, low), np.where(excess < 0, high, x)
            newton = x - excess / np.maximum(density.sum(0) / math.sqrt(2 * math.pi), 1e-300)
            following = np.where((newton > low) & (newton < high), newton, 0.5 * (low + high))
            if np.all(np.abs(following - x) <= 4e-16 * np.abs(x)):
                break
            x = following
        return x


_erf = np.vectorize(math.erf, otypes=[float])


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + _erf(x / math.sqrt(2)))


TARGET = Mixture()
POINTS = (np.arange(12) + 0.5) / 12  # the quantiles that are followed


# ---- a plan, run in float64


def output(row: Row, prediction: str, x: Array) -> Array:
    """What an exact network says at a row's level."""
    x0, epsilon = TARGET.predict(x, row.alpha, row.sigma)
    if prediction == "epsilon":
        return epsilon
    if prediction == "flow_prediction":
        return epsilon - x0
    raise ValueError(prediction)


def run(
    plan: Plan,
    x: Array,
    network: Callable[[Row, Array], Array],
    noise: Callable[[int], Array] | None = None,
    exact: Callable[[Row], Array] | None = None,
    exact_rows: int = 0,
) -> Array:
    """x after every row: the formula of fastdiff/plan.py. The first rows may be given the exact state instead of theirs,
    so that the history that they leave is exact."""
    anchor, slots = x, [x] * 4
    for i, row in enumerate(plan):
        given = exact is not None and i <= exact_rows
        if given:
            x = state = exact(row)
        m = network(row, x) if row.calls_model else None
        x0 = row.p * x + (row.q * m if m is not None else 0)
        if row.clip < math.inf:
            x0 = np.clip(x0, -row.clip, row.clip)
        terms = {"x": x, "anchor": anchor, "x0": x0 * row.scale, "m": m}
        terms |= {f"slot{k}": slots[slot] for k, slot in enumerate(row.reads)}
        if row.uses("z"):
            assert noise is not None
            terms["z"] = noise(i)
        x, anchor, kept = (
            None if c is None else sum((value * terms[term] for term, value in c.items() if value), np.zeros_like(x))
            for c in (row.x, row.anchor or {"anchor": 1.0}, row.slot)
        )
        if given and row.anchor is not None:
            anchor = state
        if row.write is not None:
            slots[row.write] = kept
    return x
