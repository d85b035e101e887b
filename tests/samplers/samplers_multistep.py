"""What the tests of multistep samplers share: walking a plan in float64, and the published updates written out.

The references here know a level as (α, σ), λ = ln(α/σ), and a network as f(x, level) -> (x̂_0, ε). Integrals are taken
by quadrature. ``z`` is the noise of the reference's next row.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

import fastdiff
from fastdiff.plan.plan import SLOTS, Plan, Row
from fastdiff.schedules.level import Level

NODES, WEIGHTS = (array.tolist() for array in np.polynomial.legendre.leggauss(60))
Model = Callable[[Tensor, Level], tuple[Tensor, Tensor]]


def walk(
    plan: Plan,
    x: Tensor,
    model: Callable[[Tensor, Row, int], Tensor],
    noises: Sequence[Tensor] | None = None,
    mend: Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None = None,
) -> Iterator[Tensor]:
    """The state after each row; the network is given c_in·x. ``mend`` may replace (x, anchor) after a row."""
    anchor, slots = None, [None] * SLOTS
    for i, row in enumerate(plan):
        noise = noises[i].to(x.dtype) if noises is not None and row.uses("z") else None
        m = model(x * row.c_in, row, i) if row.calls_model else ()
        out = fastdiff.ops.update(x, m, plan, i, anchor=anchor, slots=slots, noise=noise)
        x = out.x
        anchor = anchor if row.anchor is None else out.anchor
        if row.write is not None:
            slots[row.write] = out.slot
        if mend is not None:
            x, anchor = mend(i, x, anchor)
        yield x


class Network:
    """A made-up network: its i-th call returns a function of its input and i, so that both walks call the same one."""

    def __init__(self, prediction: str, clip: float | None) -> None:
        self.prediction, self.clip, self.calls, self.told = prediction, clip, 0, []

    def raw(self, x: Tensor, i: int) -> Tensor:
        return torch.sin(1.7 * x + 0.9 * i) * 0.8

    def __call__(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """(x̂_0, ε) as the prediction types are defined."""
        a, s = level.alpha, level.sigma
        m = self.raw(x * level.c_in, self.calls)
        self.calls += 1
        self.told.append(level.t)
        if self.prediction == "epsilon":
            x0 = (x - s * m) / a
        elif self.prediction == "v_prediction":  # of the state scaled to unit variance
            n = math.hypot(a, s)
            x0 = (a / n) * (x / n) - (s / n) * m
        elif self.prediction == "flow_prediction":
            x0 = (x - s * m) / (a + s)
        elif self.prediction == "edm":
            r, d = s / a, level.sigma_data
            x0 = d**2 / (r**2 + d**2) * x / a + r * d / math.sqrt(r**2 + d**2) * m
        elif self.prediction == "score":
            x0 = (x + s**2 * (level.c_in * m)) / a
        else:
            x0 = m
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        return x0, (x - a * x0) / s


def lam(level: Level) -> float:
    return math.log(level.alpha / level.sigma)


def lagrange(nodes: Sequence[float], j: int, u: float) -> float:
    return math.prod((u - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j)


def quadrature(f: Callable[[float], float], a: float, b: float) -> float:
    return sum(w * f(a + (n + 1) / 2 * (b - a)) for n, w in zip(NODES, WEIGHTS, strict=True)) * (b - a) / 2


def integral(
    kernel: Callable[[float], float], nodes: Sequence[float], values: Sequence[Tensor], a: float, b: float, scale=float
) -> Tensor:
    """∫_a^b kernel(u)·P(scale(u)) du, P the polynomial with these values at the nodes."""

    def weighed(j: int) -> float:
        return quadrature(lambda u: kernel(u) * lagrange(nodes, j, scale(u)), a, b)

    return sum(weighed(j) * value for j, value in enumerate(values))


# ---- multistep


def dpm_reference(
    points: Sequence[Level], x: Tensor, f: Model, z: Iterator[Tensor], *, orders: Sequence[int], noise_form: bool,
    rule: str, eta: float = 0.0,
) -> Iterator[Tensor]:  # fmt: skip
    """Lu et al. 2022a, 2022b and the published code of their third order; with noise as k-diffusion has it."""
    past: list[Tensor] = []  # newest first
    for i, order in enumerate(orders):
        x0, epsilon = f(x, points[i])
        past.insert(0, epsilon if noise_form else x0)
        noise = next(z)
        if points[i + 1].sigma == 0:
            x = points[i + 1].alpha * x0
        else:
            step = noise_form_step if noise_form else data_form_step
            nodes = [lam(points[i - k]) for k in range(order)]
            x = step(points[i], points[i + 1], x, nodes, past[:order], noise, rule, eta)
        yield x


def differences(nodes: Sequence[float], values: Sequence[Tensor], h: float) -> list[Tensor]:
    """D_0, D_1, D_2 as the published codes form them."""
    if len(values) < 3:
        return [
            values[0],
            *((values[0] - v) / ((nodes[0] - n) / h) for n, v in zip(nodes[1:], values[1:], strict=True)),
        ]
    r0, r1 = (nodes[0] - nodes[1]) / h, (nodes[1] - nodes[2]) / h
    first, second = (values[0] - values[1]) / r0, (values[1] - values[2]) / r1
    return [values[0], first + r0 / (r0 + r1) * (first - second), (first - second) / (r0 + r1)]


def data_form_step(here, there, x, nodes, values, noise, rule, eta) -> Tensor:
    a, b, g = lam(here), lam(there), 1 + eta
    H = g * (b - a)
    x = there.sigma / here.sigma * math.exp(-eta * (b - a)) * x
    x = x + noise * there.sigma * math.sqrt(1 - math.exp(-2 * eta * (b - a)))
    if rule == "exact" or (rule == "heun" and len(values) == 2):
        return x + integral(lambda u: g * there.alpha * math.exp(-g * (b - u)), nodes, values, a, b)
    flat = 1 - math.exp(-H)
    factors = [flat, flat / 2] if len(values) < 3 else [flat, 1 - flat / H, 0.5 - (1 - flat / H) / H]
    D = differences(nodes, values, b - a)
    return x + there.alpha * sum(c * d for c, d in zip(factors, D, strict=False))


def noise_form_step(here, there, x, nodes, values, noise, rule, eta) -> Tensor:
    a, b, g = lam(here), lam(there), 1 + eta
    h = b - a
    x = there.alpha / here.alpha * x + noise * there.sigma * math.sqrt(eta * (math.exp(2 * h) - 1))
    if rule == "exact" or (rule == "heun" and len(values) == 2):
        return x - integral(lambda u: g * there.sigma * math.exp(b - u), nodes, values, a, b)
    flat = math.exp(h) - 1
    factors = [flat, flat / 2] if len(values) < 3 else [flat, flat / h - 1, (flat - h) / h**2 - 0.5]
    D = differences(nodes, values, h)
    return x - g * there.sigma * sum(c * d for c, d in zip(factors, D, strict=False))


def adams_reference(
    points: Sequence[Level], x: Tensor, f: Model, *, orders: Sequence[int], logarithmic: bool
) -> Iterator[Tensor]:
    """x/α = ∫ ε dρ, ε a polynomial in ρ (LMS) or in ln ρ (DEIS)."""
    past: list[Tensor] = []
    scale = math.log if logarithmic else float
    for i, order in enumerate(orders):
        here, there = points[i], points[i + 1]
        x0, epsilon = f(x, here)
        past.insert(0, epsilon)
        nodes = [scale(points[i - k].sigma / points[i - k].alpha) for k in range(order)]
        ends = here.sigma / here.alpha, there.sigma / there.alpha
        if logarithmic and there.sigma == 0:
            x = there.alpha * x0
        else:
            x = there.alpha * (x / here.alpha + integral(lambda _: 1.0, nodes, past[:order], *ends, scale))
        yield x


def unipc_reference(
    points: Sequence[Level], x: Tensor, f: Model, *, orders: Sequence[int], noise_form: bool, variant: str,
    left_out: Sequence[int] = (),
) -> Iterator[Tensor]:  # fmt: skip
    """Zhao et al. 2023, Algorithms 5 to 8, by their linear systems."""
    past: list[Tensor] = []
    before: list[Level] = []
    previous = x

    def solved(start: Level, end: Level, state: Tensor, taus: list[float], differences: list[Tensor]) -> Tensor:
        if end.sigma == 0:
            return end.alpha * (past[0] if not noise_form else (state - start.sigma * past[0]) / start.alpha)
        h = lam(end) - lam(start)
        hh = h if noise_form else -h
        B = hh if variant == "bh1" else math.expm1(hh)
        base = (
            end.alpha / start.alpha * state - end.sigma * math.expm1(hh) * past[0]
            if noise_form
            else end.sigma / start.sigma * state - end.alpha * math.expm1(hh) * past[0]
        )
        n = len(taus)
        if n == 0:
            return base
        phi = [quadrature(lambda u, k=k: math.exp((1 - u) * hh) * u**k, 0, 1) for k in range(1, n + 1)]
        R = np.array([[tau ** (k - 1) for tau in taus] for k in range(1, n + 1)])
        rho = np.linalg.solve(R, np.array([hh * p / B for p in phi]))
        if n == 1:
            rho = [0.5]
        total = sum(float(r) * D for r, D in zip(rho, differences, strict=True))
        return base - (end.sigma if noise_form else end.alpha) * B * total

    for i, order in enumerate(orders):
        here, there = points[i], points[i + 1]
        x0, epsilon = f(x, here)
        new = epsilon if noise_form else x0
        if i > 0 and i - 1 not in left_out:
            start, p = points[i - 1], orders[i - 1]
            h = lam(here) - lam(start)
            taus = [(lam(before[k]) - lam(start)) / h for k in range(1, p)] + [1.0]
            differences = [(past[k] - past[0]) / taus[k - 1] for k in range(1, p)] + [new - past[0]]
            x = solved(start, here, previous, taus, differences)
        past.insert(0, new)
        before.insert(0, here)
        previous = x
        taus = []
        if there.sigma:
            taus = [(lam(before[k]) - lam(here)) / (lam(there) - lam(here)) for k in range(1, order)]
        x = solved(here, there, x, taus, [(past[k] - past[0]) / taus[k - 1] for k in range(1, order)])
        yield x


def pndm_reference(
    points: Sequence[Level], middles: Sequence[Level], x: Tensor, f: Model, prk: bool
) -> Iterator[Tensor]:
    """Liu et al. 2022, Equations 9, 12 and 13, in ᾱ."""

    def phi(x: Tensor, e: Tensor, here: Level, there: Level) -> Tensor:
        a, b = here.alpha**2, there.alpha**2
        push = (b - a) / (math.sqrt(a) * (math.sqrt((1 - b) * a) + math.sqrt((1 - a) * b)))
        return math.sqrt(b / a) * x - push * e

    past: list[Tensor] = []
    for i in range(len(points) - 1):
        here, there = points[i], points[i + 1]
        e1 = f(x, here)[1]
        if prk and i < 3:
            middle = middles[i]
            yield (x1 := phi(x, e1, here, middle))
            e2 = f(x1, middle)[1]
            yield (x2 := phi(x, e2, here, middle))
            e3 = f(x2, middle)[1]
            yield (x3 := phi(x, e3, here, there))
            e = (e1 + 2 * e2 + 2 * e3 + f(x3, there)[1]) / 6
            past.insert(0, e1)
        elif not prk and i == 0 and len(points) > 2:
            past.insert(0, e1)
            yield (x1 := phi(x, e1, here, there))
            e = (e1 + f(x1, there)[1]) / 2
        else:
            past.insert(0, e1)
            factors, divisor = [((1,), 1), ((3, -1), 2), ((23, -16, 5), 12), ((55, -59, 37, -9), 24)][min(i, 3)]
            e = sum(c * value for c, value in zip(factors, past, strict=False)) / divisor
        x = phi(x, e, here, there)
        yield x
