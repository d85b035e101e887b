"""Singlestep DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b): the calls of a step start from the step's own x.

A step of order p is p rows from the same state, the anchor, to p levels, the last of which is the step's end. Its
levels are those of the spacing, p at a time ("listed", as in diffusers), or lie between two of them ("inserted", as in
the papers and in k-diffusion). The formulas stand in ``samplers.exponential``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from fastdiff.checks import check_choice, check_clip, check_int, check_number
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.dpm_multistep import ALGORITHMS, SOLVER_TYPES
from fastdiff.samplers.exponential import (
    blend,
    data_step,
    first_step,
    init_sigma,
    make_row,
    model_terms,
    node,
    noise_step,
)
from fastdiff.samplers.stages import rounded, timed
from fastdiff.schedules.level import Level, Schedule
from fastdiff.schedules.spacing import Spacing, levels

STAGES = ("listed", "inserted")
Group = tuple[list[Level], list[float]]  # a step's levels, and how far along the step each after the first lies


def dpm_singlestep(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    stages: str = "listed",
    sizes: Sequence[int] | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Plan:
    """Singlestep DPM-Solver(++) of any order; ``dpm_solver`` names its forms.

    Args:
        steps: the levels that ``spacing`` chooses; None visits every timestep of a NoiseSchedule.
        order: 1, 2 or 3 network calls a step.
        algorithm: "dpmsolver++" integrates x̂_0, "dpmsolver" ε, but for a step from a level without signal.
        solver_type: order 2's slope weighs half the step ("midpoint"), or is integrated ("heun", which is "exact"
            here). Order 3 takes the slope to the last call ("midpoint": DPM-Solver-3 of Lu et al. 2022a, Algorithm 2),
            or the parabola through all calls.
        lower_order_final: for "listed": end with steps of order 2 and 1, so that any number of levels will do;
            else it must be a multiple of ``order``. A step that leaves or reaches an infinite λ has order 1.
        stages: "listed" or "inserted": the calls' levels are the spacing's, or the step's inner ones lie at λ + r h
            (order 2), λ + h/3 and λ + 2h/3 (order 3), where the timestep is interpolated.
        sizes: for "listed": how many calls each step makes, 1 to 3, in place of order and lower_order_final.
        eta: the share of the SDE's noise in each row, as ancestral samplers share it (Algorithm 1 of k-diffusion's
            dpmpp_sde): a step goes down to σ_down and noise leads back to σ'. 1 is diffusers' "sde-dpmsolver++".
        s_noise: a factor of the noise, which is drawn by (stream, row). A Brownian tree correlates the noise of
            a step's rows; here they are independent.
        r: where the second call of order 2 lies.

    Raises:
        TypeError, ValueError: for arguments outside these, eta > 0 with algorithm="dpmsolver" among them.
    """
    check_int("order", order, 1, 3)
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    check_choice("stages", stages, STAGES)
    check_number("eta", eta, 0, 1)
    check_number("s_noise", s_noise, 0)
    if not 0 < check_number("r", r, 0, 1) < 1:
        raise ValueError(f"r must be between 0 and 1; got {r}")
    if r != 0.5 and (order != 2 or stages == "listed"):
        raise ValueError(f"r goes with order=2 and stages='inserted'; got order={order}, stages={stages!r}")
    if eta and algorithm == "dpmsolver":
        raise ValueError("eta goes with algorithm='dpmsolver++' in singlestep form; got 'dpmsolver'")
    bound, noise_form = check_clip(clip), algorithm == "dpmsolver"
    stops = levels(schedule, steps, spacing)
    if sizes is not None and stages != "listed":
        raise ValueError(f"sizes goes with stages='listed'; got {stages!r}")
    if stages == "listed":
        groups = _listed(stops, order, lower_order_final, sizes)
    else:
        inner = (r,) if order == 2 else (1 / 3, 2 / 3)[: order - 1]
        quantize = Spacing.of(spacing).quantize
        groups = [inserted(schedule, a, b, inner, quantize) for a, b in pairwise(timed(stops, quantize or order == 1))]
    rows = []
    for group, shares in groups:
        # The papers' third order integrates the slope of its second row; diffusers' rows all have the solver's type.
        types = ["heun" if stages == "inserted" and len(group) == 4 else solver_type, solver_type]
        rows += step_rows(group, shares, prediction, bound, noise_form, types, eta, s_noise)
    return Plan(tuple(rows), name="dpm_singlestep", init_sigma=init_sigma(stops[0]))


def _listed(stops: list[Level], order: int, lower_order_final: bool, given: Sequence[int] | None) -> list[Group]:
    """The spacing's levels in groups that share their ends: steps of ``order`` calls, then of fewer; or as given."""
    count = len(stops) - 1
    if given is None:
        sizes = _sizes(stops, count, order, lower_order_final)
    else:
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"sizes must be a sequence of ints; got {type(given).__name__}")
        sizes = [check_int(f"sizes[{i}]", size, 1, 3) for i, size in enumerate(given)]
        if sum(sizes) != count:
            raise ValueError(f"sizes must add up to the spacing's {count} calls; got {sizes}")
        if (stops[0].alpha == 0 and sizes[0] > 1) or (stops[-1].sigma == 0 and sizes[-1] > 1):
            raise ValueError(f"a step that leaves or reaches an infinite λ makes one call; got sizes {sizes}")
    ends = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    return [
        (stops[a : b + 1], [*(node(level, stops[a], stops[b]) for level in stops[a + 1 : b]), 1.0])
        for a, b in pairwise(ends)
    ]


def _sizes(stops: list[Level], count: int, order: int, lower_order_final: bool) -> list[int]:
    whole, rest = divmod(count, order)
    if not lower_order_final and rest:
        raise ValueError(
            f"without lower_order_final, order {order} takes a number of steps that {order} divides; got {count}"
        )
    sizes = [order] * whole + [rest] * (rest > 0)
    if (lower_order_final or stops[-1].sigma == 0) and sizes[-1] == order > 1:
        sizes[-1:] = [order - 1, 1]
    if stops[-1].sigma == 0 and sizes[-1] > 1:
        sizes[-1:] = [sizes[-1] - 1, 1]
    if stops[0].alpha == 0 and sizes[0] > 1:
        sizes[:1] = [1, sizes[0] - 1]
    return sizes


def inserted(schedule: Schedule, here: Level, there: Level, shares: Sequence[float], quantize: bool) -> Group:
    """Two levels and, where λ is finite at both, the levels at these shares of the way."""
    low, high = here.log_snr, there.log_snr
    if not math.isfinite(high - low):
        return [here, there], [1.0]
    ratios = (math.exp(-low - share * (high - low)) for share in shares)
    between = [rounded(schedule.at_ratio(ratio), quantize) for ratio in ratios]
    return [here, *between, there], [*shares, 1.0]


def grown_by(h: float, eta: float) -> float:
    """What h grows by where σ_down² = σ'² − σ_up², σ_up = η σ' √(1 − e^{−2h}), in states of α = 1."""
    share = eta**2 * -math.expm1(-2 * h)
    return -0.5 * math.log1p(-share) if share < 1 else math.inf


def step_rows(
    stops: list[Level],
    shares: Sequence[float],
    prediction: str,
    bound: float,
    noise_form: bool,
    types: list[str],
    eta: float,
    s_noise: float,
) -> list[Row]:
    """One step through its levels; ``types`` are the solver types of its second row and of its last one.

    ``shares`` says how far along the step each level after the first lies. Slot 0 holds the first call's output and
    slot 1 the second's, where a later row has a use for them.
    """
    start, calls = stops[0], len(stops) - 1
    if noise_form and start.alpha == 0:
        return [make_row(start, prediction, bound, first_step(start, stops[1], eta, s_noise))]
    outputs = [model_terms(noise_form, prediction, level, bound) for level in stops[:-1]]
    states: list[dict[str, float]] = []
    for k, there in enumerate(stops[1:]):
        taus = [share / shares[k] for share in shares[:k]][::-1]
        if k == 2 and types[1] == "midpoint":
            taus = taus[:1]
        rule = types[0 if calls == 3 else 1] if k == 1 else "exact"
        if noise_form:
            step = noise_step(start, there, len(taus), rule)
        else:
            extra = grown_by(there.log_snr - start.log_snr, eta) if eta else 0.0
            step = data_step(start, there, len(taus), rule, extra)
        first, *others = step.outputs(taus)
        parts = [(first, outputs[0])] if k == 0 else [(first, {"slot0": 1.0}), (others[0], outputs[k])]
        if len(others) == 2:
            parts.append((others[1], {"slot1": 1.0}))
        states.append(blend((step.keep, {"anchor" if k else "x": 1.0}), *parts, (step.noise * s_noise, {"z": 1.0})))

    rows = []
    for k, (here, x) in enumerate(zip(stops[:-1], states, strict=True)):
        reads = (0, 1) if "slot1" in x else (0,) if "slot0" in x else ()
        wanted = any(f"slot{k}" in later for later in states[k + 1 :])
        anchor = {"x": 1.0} if k == 0 and calls > 1 else None
        rows.append(
            make_row(
                here, prediction, bound, x, anchor=anchor, slot=outputs[k], write=k if wanted else None, reads=reads
            )
        )
    return rows
