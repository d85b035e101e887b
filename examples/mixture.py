"""A target whose answers are known: a mixture of Gaussians on the line, with exact networks for every kind of process.

Its score is exact at every level. So is the solution of its probability-flow ODE, since in one dimension the flow keeps
every point's quantile: an error needs no other solver to be measured against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule, Plan, Row

Array = NDArray[np.float64]
Network = Callable[[Array, float], Array]  # (c_in·x, t) -> m, as fastdiff.sample calls it

WEIGHTS = np.array([[0.45], [0.55]])
MEANS = np.array([[-1.0], [0.9]])
DEVIATIONS = np.array([[0.5], [0.6]])


def _parts(x: Array, alpha: float, sigma: float) -> tuple[Array, Array, Array]:
    """Each component's density at a state x = alpha·x_0 + sigma·ε, x's distance from its mean, its variance."""
    variance = (alpha * DEVIATIONS) ** 2 + sigma**2
    distance = x - alpha * MEANS
    return WEIGHTS * np.exp(-0.5 * distance**2 / variance) / np.sqrt(2 * np.pi * variance), distance, variance


def predict(x: Array, alpha: float, sigma: float) -> tuple[Array, Array]:
    """(E[x_0 | x], E[ε | x]) at a level, neither by way of the other."""
    density, distance, variance = _parts(x, alpha, sigma)
    pull = density / density.sum(0) * distance / variance
    share = density / density.sum(0)
    return (share * MEANS + alpha * DEVIATIONS**2 * pull).sum(0), sigma * pull.sum(0)


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


# ---- exact networks: each finds its level from the t that it is told


def vp_level(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    """(α, σ) at a timestep, ln(σ/α) being linear between two indices."""
    bar = schedule.alphas_cumprod.numpy()
    ratio = math.exp(np.interp(t, np.arange(len(bar)), 0.5 * np.log((1 - bar) / bar)))
    alpha = 1 / math.sqrt(1 + ratio**2)
    return alpha, ratio * alpha


def epsilon_network(schedule: NoiseSchedule) -> Network:
    """ε of VP states, which a walk of VE states shows it as well."""
    bar = schedule.alphas_cumprod.numpy()
    log_ratios, indices = 0.5 * np.log((1 - bar) / bar), np.arange(len(bar))

    def network(x: Array, t: float) -> Array:
        ratio = math.exp(np.interp(t, indices, log_ratios))
        alpha = 1 / math.sqrt(1 + ratio**2)
        return predict(x, alpha, ratio * alpha)[1]

    return network


def edm_network(schedule: EDMSchedule) -> Network:
    """F of Karras et al. 2022, Equation 7: D = c_skip·x + c_out·F(c_in·x)."""

    def network(x: Array, t: float) -> Array:
        sigma, data = math.exp(4 * t), schedule.sigma_data
        x = x * math.hypot(sigma, data)
        denoised, _ = predict(x, 1.0, sigma)
        return (denoised - data**2 / (sigma**2 + data**2) * x) * math.hypot(sigma, data) / (sigma * data)

    return network


def velocity_network(schedule: FlowSchedule) -> Network:
    """ε − x_0 at σ = t/T."""

    def network(x: Array, t: float) -> Array:
        x0, epsilon = predict(x, 1 - t / schedule.T, t / schedule.T)
        return epsilon - x0

    return network


def consistency_network(schedule: NoiseSchedule, landing: Callable[[float], float | None]) -> Network:
    """The ε with which DDIM's step from t ends exactly where the flow does: at landing(t), or at x_0 where it is None."""

    def network(x: Array, t: float) -> Array:
        alpha, sigma = vp_level(schedule, t)
        to = landing(t)
        signal, noise = (1.0, 0.0) if to is None else vp_level(schedule, to)
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
    """x after the last row, by the formula of fastdiff/plan.py.

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
