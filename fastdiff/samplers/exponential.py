"""What multistep and exponential-integrator samplers share: integrals of a polynomial through a network's past outputs.

With λ = ln(α/σ), h = λ' − λ over a step (primes at its end), both forms of the probability-flow ODE are exact but for
an integral of the network's prediction f (Lu et al. 2022a, Equation 3.4; 2022b, Equation 8):

    data:   x' = (σ'/σ) x + α' ∫_0^1 h e^{−(1−τ)h} x̂_0(λ + τh) dτ
    noise:  x' = (α'/α) x − σ' ∫_0^1 h e^{(1−τ)h} ε(λ + τh) dτ

A solver replaces f by a polynomial in τ through the outputs it has; its moments ∫ z e^{(1−τ)z} τ^k dτ = z k! φ_{k+1}(z)
then give each output's weight. With noise (an SDE of the same marginals) h grows by a part that the noise refills.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastdiff.plan.row import Row
from fastdiff.schedules.level import Level, epsilon_terms, x0_terms


@dataclass(frozen=True)
class Step:
    """x' = keep·x + scale·Σ weight·f + noise·z, the weights from ``moments`` (``weights``)."""

    keep: float
    scale: float
    moments: list[float]
    noise: float = 0.0

    def outputs(self, nodes: Sequence[float] = ()) -> list[float]:
        """The coefficients of f at the step's start and at each of the nodes τ."""
        return [self.scale * weight for weight in weights(nodes, self.moments)]


def phi(k: int, z: float) -> float:
    """φ_k(z) = ∫_0^1 e^{(1−τ)z} τ^{k−1}/(k−1)! dτ for k ≥ 1 (Hochbruck & Ostermann 2010, Equation 2.10)."""
    if abs(z) < 1:  # the recursion below cancels
        total = term = 1 / math.factorial(k)
        for j in range(1, 20):
            term *= z / (k + j)
            total += term
        return total
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def moments(z: float, count: int, rule: str = "exact") -> list[float]:
    """∫_0^1 z e^{(1−τ)z} τ^k dτ for k = 0 … count; or what a published rule takes in the last one's place.

    midpoint (bh2 of UniPC): half the zeroth for the first. bh1: z/2 for the first. published: half of the second.
    """
    zeroth = math.expm1(z)
    if count == 1 and rule in ("midpoint", "bh1"):
        return [zeroth, zeroth / 2 if rule == "midpoint" else z / 2]
    values = [z * math.factorial(k) * phi(k + 1, z) for k in range(1, count + 1)]
    if count == 2 and rule == "published":
        values[1] /= 2
    return [zeroth, *values]


def weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weights of f(0), f(τ_1), … in the integral of the polynomial through them; τ_j ≠ 0 are the nodes."""
    found = []
    for j, node in enumerate(nodes):
        polynomial, scale = [0.0, 1.0], node  # τ Π (τ − τ_i), which is 0 at every node but τ_j
        for other in (*nodes[:j], *nodes[j + 1 :]):
            polynomial = [a - other * b for a, b in zip([0.0, *polynomial], [*polynomial, 0.0], strict=True)]
            scale *= node - other
        found.append(sum(c * moment for c, moment in zip(polynomial, moments, strict=True)) / scale)
    return [moments[0] - sum(found), *found]


def data_step(here: Level, there: Level, count: int = 0, rule: str = "exact", extra: float = 0.0) -> Step:
    """The step for x̂_0; ``extra`` is what h grows by for noise. λ may be infinite at either end where count is 0."""
    h = there.log_snr - here.log_snr
    return Step(
        keep=there.sigma / here.sigma * math.exp(-extra),
        scale=-there.alpha,
        moments=moments(-(h + extra), count, rule),
        noise=there.sigma * math.sqrt(-math.expm1(-2 * extra)),
    )


def noise_step(here: Level, there: Level, count: int = 0, rule: str = "exact", eta: float = 0.0) -> Step:
    """The step for ε, with the share ``eta`` of the SDE's noise. The moments are scaled by e^{−h}: σ' may be 0."""
    if here.alpha == 0:
        raise ValueError("noise prediction cannot leave a level without signal; the schedule's last ᾱ is 0")
    if eta and there.sigma == 0:
        raise ValueError("noise prediction with eta > 0 cannot end without noise; take final='sigma_min'")
    h = there.log_snr - here.log_snr
    rest = moments(h, count, rule)[1:] if count else []
    return Step(
        keep=there.alpha / here.alpha,
        scale=-(1 + eta) * there.alpha * here.ratio,
        moments=[-math.expm1(-h), *(math.exp(-h) * value for value in rest)],
        noise=there.sigma * math.sqrt(eta * math.expm1(2 * h)) if eta else 0.0,
    )


def first_step(here: Level, there: Level, eta: float = 0.0, s_noise: float = 1.0) -> dict[str, float]:
    """The first-order step in x̂_0 from a level without signal, for samplers that otherwise integrate ε.

    There λ is −∞ and ε says nothing of x_0, but x̂_0 is known: x' = α' x̂_0 + σ' ε, the x at hand being σ ε. Under
    ``eta`` > 0 all of the noise is new: the step is infinitely long.
    """
    if eta:
        return {"x0": there.alpha, "z": there.sigma * s_noise}
    return {"x": there.sigma / here.sigma, "x0": there.alpha}


def warm_up(stops: Sequence[Level], order: int) -> list[int]:
    """The order that each step's history allows; an output at a level without signal is of no use to a later step."""
    useless = 0 if stops[0].alpha else 1
    return [min(order, max(1, i + 1 - useless)) for i in range(len(stops) - 1)]


def model_terms(noise_form: bool, prediction: str, level: Level, bound: float) -> dict[str, float]:
    """x̂_0, or ε, of this row's call as a combination of terms; ε from the clipped x̂_0 where there is a bound."""
    if not noise_form:
        return {"x0": 1.0}
    if math.isfinite(bound):
        return {"x": 1 / level.sigma, "x0": -level.alpha / level.sigma}
    return epsilon_terms(prediction, level)


def blend(*parts: tuple[float, Mapping[str, float]]) -> dict[str, float]:
    """Σ factor·terms."""
    total: dict[str, float] = {}
    for factor, terms in parts:
        for term, value in terms.items():
            total[term] = total.get(term, 0.0) + factor * value
    return {term: value for term, value in total.items() if value}


def past(coefficients: Sequence[float]) -> list[tuple[float, Mapping[str, float]]]:
    """Parts of ``blend``: these coefficients of slot0, slot1, …"""
    return [(value, {f"slot{k}": 1.0}) for k, value in enumerate(coefficients)]


def history(spans: Sequence[int]) -> list[tuple[tuple[int, ...], int | None]]:
    """For each row (the slots it reads, newest first; the slot it writes), row i reading the last spans[i] outputs.

    Output i lies in slot i mod (the longest span). An output that no row reads is not written.
    """
    depth = max(spans)
    plan: list[tuple[tuple[int, ...], int | None]] = []
    for i, span in enumerate(spans):
        wanted = any(later >= k for k, later in enumerate(spans[i + 1 : i + 1 + depth], start=1))
        plan.append((tuple((i - k) % depth for k in range(1, span + 1)), i % depth if wanted else None))
    return plan


def node(level: Level, here: Level, there: Level) -> float:
    """Where a level lies on a step: τ = (λ_level − λ)/(λ' − λ)."""
    return (level.log_snr - here.log_snr) / (there.log_snr - here.log_snr)


def make_row(
    level: Level,
    prediction: str,
    bound: float,
    x: Mapping[str, float],
    *,
    anchor: Mapping[str, float] | None = None,
    slot: Mapping[str, float] | None = None,
    reads: tuple[int, ...] = (),
    write: int | None = None,
) -> Row:
    """The row of a network call at a level; ``slot`` counts only where ``write`` names one."""
    p, q = x0_terms(prediction, level)
    return Row(
        t=level.t, alpha=level.alpha, sigma=level.sigma, c_in=level.c_in, p=p, q=q, clip=bound, x=x, anchor=anchor,
        slot=None if write is None else slot, reads=reads, write=write,
    )  # fmt: skip


def init_sigma(first: Level) -> float:
    """The scale of x_T: σ_max for VE states, 1 for those whose variance stays near 1."""
    return first.sigma if first.alpha == 1 else 1.0
