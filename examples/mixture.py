"""A target whose answers are known: a mixture of Gaussians on the line, with exact networks for every kind of process.

Its score is exact at every level. So is the solution of its probability-flow ODE, since in one dimension the flow keeps
every point's quantile: an error needs no other solver to be measured against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule, Plan, Row
from fastdiff.schedules.level import Schedule

Array = NDArray[np.float64]
Predictor = Callable[[Array, float, float], tuple[Array, Array]]
Network = Callable[[Array, float], Array]  # (c_in·x, t) -> m, as fastdiff.sample calls it

WEIGHTS = np.array([[0.45], [0.55]])
MEANS = np.array([[-1.0], [0.9]])
DEVIATIONS = np.array([[0.5], [0.6]])
DEVIATION = 0.8  # of the simpler target, N(0, 0.8²)


def _parts(x: Array, alpha: float, sigma: float) -> tuple[Array, Array, Array]:
    """Each component's density at a state x = alpha·x_0 + sigma·ε, x's distance from its mean, its variance."""
    variance = (alpha * DEVIATIONS) ** 2 + sigma**2
    distance = x - alpha * MEANS
    return WEIGHTS * np.exp(-0.5 * distance**2 / variance) / np.sqrt(2 * np.pi * variance), distance, variance


def predict(x: Array, alpha: float, sigma: float) -> tuple[Array, Array]:
    """(E[x_0 | x], E[ε | x]) at a level, neither by way of the other."""
    variance = (alpha * DEVIATIONS) ** 2 + sigma**2
    pull = (x - alpha * MEANS) / variance
    log_density = np.log(WEIGHTS / np.sqrt(variance)) - 0.5 * variance * pull**2
    second = 0.5 + 0.5 * np.tanh(0.5 * (log_density[1] - log_density[0]))  # the second component's share
    x0 = MEANS + alpha * DEVIATIONS**2 * pull
    return x0[0] + second * (x0[1] - x0[0]), sigma * (pull[0] + second * (pull[1] - pull[0]))


def quantiles(u: Array, alpha: float, sigma: float) -> Array:
    """The x below which a share u of the states at a level lies: where the flow takes the point of quantile u."""
    variance = (alpha * DEVIATIONS) ** 2 + sigma**2
    low = np.full_like(u, (alpha * MEANS - 9 * np.sqrt(variance)).min())
    high = np.full_like(u, (alpha * MEANS + 9 * np.sqrt(variance)).max())
    x = (WEIGHTS * alpha * MEANS).sum() * np.ones_like(u)
    for _ in range(100):  # Newton's method, and bisection where that would leave the bracket
        density, distance, _variance = _parts(x, alpha, sigma)
        excess = (WEIGHTS * normal_cdf(distance / np.sqrt(variance))).sum(0) - u
        low, high = np.where(excess < 0, x, low), np.where(excess < 0, high, x)
        newton = x - excess / np.maximum(density.sum(0), 1e-300)
        before, x = x, np.where((low < newton) & (newton < high), newton, (low + high) / 2)
        if np.all(np.abs(x - before) <= 1e-15 * np.abs(high).max()):
            break
    return x


def normal_cdf(x: Array) -> Array:
    return np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2)) / 2


def draw(count: int, seed: int, alpha: float = 1.0, sigma: float = 0.0) -> Array:
    """States at a level."""
    generator = np.random.default_rng(seed)
    which = generator.choice(len(WEIGHTS), size=count, p=WEIGHTS[:, 0])
    x0 = MEANS[which, 0] + DEVIATIONS[which, 0] * generator.normal(size=count)
    return alpha * x0 + sigma * generator.normal(size=count)


_TABLE = normal_cdf(np.linspace(-6, 6, 4001))


def flow(x: Array, here: tuple[float, float], there: tuple[float, float]) -> Array:
    """The probability flow from one level (alpha, sigma) to another, to 1e-6."""
    return np.interp(x, quantiles(_TABLE, *here), quantiles(_TABLE, *there))


def predict_gaussian(x: Array, alpha: float, sigma: float) -> tuple[Array, Array]:
    """The same where the data are N(0, DEVIATION²): linear in x."""
    total = (alpha * DEVIATION) ** 2 + sigma**2
    return alpha * DEVIATION**2 / total * x, sigma / total * x


# ---- exact networks: each finds its level from the t that it is told


def level_at(schedule: Schedule, t: float) -> tuple[float, float]:
    """(alpha, sigma) at what a network is told; between two indices of a table ln(σ/α) is linear."""
    if isinstance(schedule, EDMSchedule):
        return 1.0, math.exp(4 * t)
    if isinstance(schedule, FlowSchedule):
        return 1 - t / schedule.T, t / schedule.T
    ratio = math.exp(np.interp(t, *_log_ratios(schedule)))
    alpha = 1 / math.sqrt(1 + ratio**2)
    return alpha, ratio * alpha


@lru_cache(maxsize=4)
def _log_ratios(schedule: NoiseSchedule) -> tuple[Array, Array]:
    bar = schedule.alphas_cumprod.numpy()
    return np.arange(len(bar)), 0.5 * np.log((1 - bar) / bar)


def exact_network(schedule: Schedule, prediction: str, expected: Predictor = predict) -> Network:
    """A network without error, which predicts "epsilon", "flow_prediction" or "edm"."""

    def network(x: Array, t: float) -> Array:
        alpha, sigma = level_at(schedule, t)
        if isinstance(schedule, EDMSchedule):
            data = schedule.sigma_data
            x = x * math.hypot(sigma, data)
        x0, epsilon = expected(x, alpha, sigma)
        if prediction == "flow_prediction":
            return epsilon - x0
        if prediction == "edm":  # D = c_skip·x + c_out·F (Karras et al. 2022, Equation 7)
            return (x0 - data**2 / (sigma**2 + data**2) * x) * math.hypot(sigma, data) / (sigma * data)
        return epsilon

    return network


def consistency_network(schedule: NoiseSchedule, landing: Callable[[float], float | None]) -> Network:
    """The ε with which DDIM's step from t ends where the flow does: at landing(t), or at x_0 where that is None."""

    def network(x: Array, t: float) -> Array:
        (alpha, sigma), to = level_at(schedule, t), landing(t)
        signal, noise = (1.0, 0.0) if to is None else level_at(schedule, to)
        return (signal / alpha * x - flow(x, (alpha, sigma), (signal, noise))) / (signal * sigma / alpha - noise)

    return network


# ---- a plan in float64


def run(
    plan: Plan,
    network: Network,
    x: Array,
    *,
    exact: Callable[[Row], Array | None] = lambda row: None,
    noise: Callable[[int], Array] | None = None,
) -> Array:
    """x after the last row, by the formula of fastdiff/plan/row.py.

    Where ``exact`` gives a row's state, that is taken in place of what the row before made of it: rows that start so
    leave exact outputs in the slots.
    """
    anchor, slots = np.zeros_like(x), [np.zeros_like(x)] * 4
    for i, row in enumerate(plan):
        given = exact(row)
        x = x if given is None else given
        m = network(row.c_in * x, row.t) if row.calls_model else 0.0 * x
        x0 = row.scale * np.clip(row.p * x + row.q * m, -row.clip, row.clip)
        terms = {"x": x, "anchor": anchor, "x0": x0, "m": m}
        terms |= {f"slot{k}": slots[slot] for k, slot in enumerate(row.reads)}
        if noise is not None and row.uses("z"):
            terms["z"] = noise(i)

        new = [sum(value * terms[term] for term, value in c.items() if value) if c else None
               for c in (row.x, row.anchor, row.slot)]  # fmt: skip
        x, anchor = new[0], anchor if new[1] is None else new[1]
        if row.write is not None:
            slots[row.write] = new[2]
    return x
