"""SA-Solver, a stochastic Adams method with a predictor and a corrector (Xue et al. 2023)."""

from __future__ import annotations

import math

from fastdiff.checks import check_clip, check_int, check_number
from fastdiff.plan.plan import Plan
from fastdiff.samplers.exponential import blend, data_step, history, init_sigma, make_row, node, past, warm_up
from fastdiff.schedules.level import Level, Schedule
from fastdiff.schedules.spacing import Spacing, levels

OUTPUT = {"x0": 1.0}


def sa_solver(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    tau: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    predictor_order: int = 2,
    corrector_order: int = 2,
    lower_order_final: bool = True,
) -> Plan:
    """x' = (σ'/σ) e^{−τ²h} x + α' ∫ (1 + τ²) e^{−(1+τ²)(λ'−λ)} x̂_0 dλ + σ' √(1 − e^{−2τ²h}) z (Xue et al. 2023, Eq. 8).

    The predictor integrates the polynomial through the last outputs (their Equation 14), the corrector that through the
    new output, too (Equation 17), from the corrected state before it and with the predictor's noise; the new output is
    not computed again. One row corrects the step that led to its level, and predicts the next one. τ = 0 solves the
    probability-flow ODE; τ = 1 and predictor_order=1 without a corrector is DDIM at η = 1.

    Args:
        tau: τ ≥ 0, the amount of noise, in steps that start at s_tmin ≤ σ/α ≤ s_tmax; 0 elsewhere. The paper takes
            τ = 1 between 0.05 and 1 for CIFAR-10, and everywhere in latent space.
        s_noise: a factor of the noise, which is drawn by (stream, row).
        predictor_order: 1 to 3 outputs. corrector_order: 1 to 3 outputs, the new one among them; 0 is no corrector. The
            first rows, and one that leaves or reaches an infinite λ, have less.
        lower_order_final: the last steps fall in order to 1. The very last has 1 where it ends without noise.
    """
    check_number("tau", tau, 0)
    check_number("s_tmin", s_tmin, 0)
    check_number("s_tmax", s_tmax, s_tmin, math.inf)
    check_number("s_noise", s_noise, 0)
    check_int("predictor_order", predictor_order, 1, 3)
    check_int("corrector_order", corrector_order, 0, 3)
    bound = check_clip(clip)
    stops = levels(schedule, steps, spacing)
    count = len(stops) - 1
    orders = warm_up(stops, predictor_order)
    # A corrector of c outputs reads c − 1 older ones; what was said of a level without signal is none of them.
    useful = [i - (stops[0].alpha == 0) for i in range(count)]
    corrects = [min(corrector_order, older + 1) if older > 0 else 0 for older in useful] + [0]
    if lower_order_final:
        orders = [min(n, count - i) for i, n in enumerate(orders)]
    if stops[-1].sigma == 0:
        orders[-1] = 1
        corrects[count - 1] = 0  # the last x' is x̂_0, whatever the corrected x

    def added(here: Level, there: Level) -> float:
        """τ²h, by which the step is longer than the ODE's."""
        noisy = tau > 0 and (s_tmin <= here.ratio <= s_tmax)
        return tau**2 * (there.log_snr - here.log_snr) if noisy else 0.0

    rows = []
    spans = [max(orders[i] - 1, corrects[i] - 1, 0) for i in range(count)]
    for i, (reads, write) in enumerate(history(spans)):
        here, there = stops[i], stops[i + 1]
        x = {"x": 1.0}
        if corrects[i]:
            start, nodes = stops[i - 1], corrects[i] - 1
            step = data_step(start, here, nodes, extra=added(start, here))
            if nodes:
                *before, now = step.outputs([*(node(stops[i - 1 - k], start, here) for k in range(1, nodes)), 1.0])
            else:
                before, now = [], step.scale * step.moments[0]
            x = blend((1.0, {"anchor": 1.0}), (now, OUTPUT), *past(before))
        step = data_step(here, there, orders[i] - 1, extra=added(here, there))
        now, *before = step.outputs([node(stops[i - k], here, there) for k in range(1, orders[i])])
        # What the corrector starts from: the corrected state and the same noise, as far as the step keeps them.
        kept = blend((step.keep, x), (step.noise * s_noise, {"z": 1.0}))
        following = blend((1.0, kept), (now, OUTPUT), *past(before))
        anchor = kept if corrects[i + 1] else None
        rows.append(make_row(here, prediction, bound, following, anchor=anchor, slot=OUTPUT, reads=reads, write=write))
    return Plan(tuple(rows), name="sa_solver", init_sigma=init_sigma(stops[0]))
