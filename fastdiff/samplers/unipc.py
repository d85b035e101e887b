"""UniPC, a predictor and a corrector that share their network calls (Zhao et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from fastdiff.checks import check_choice, check_clip, check_int
from fastdiff.plan.plan import Plan
from fastdiff.samplers.exponential import (
    blend,
    data_step,
    first_step,
    history,
    init_sigma,
    make_row,
    model_terms,
    node,
    noise_step,
    past,
    warm_up,
)
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.spacing import Spacing, levels

SOLVER_TYPES = ("bh1", "bh2")


def unipc(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
) -> Plan:
    """One row corrects the step that led to its level, x^c (the anchor), and predicts the next one from there, x'.

    UniP-p integrates the polynomial through the last p outputs, UniC-p through those and the new one (Algorithms 5–8);
    the new output is not computed again at x^c. Where one difference is all there is (UniP-2, UniC-1) it weighs
    B(h)/2, B = h (bh1) or e^h − 1 (bh2) with h's sign changed for x̂_0; elsewhere B cancels.

    Args:
        order: p, 1 to 3; the corrected method is of order p + 1. The first rows have less.
        solver_type: "bh1" or "bh2".
        predict_x0: integrate x̂_0 rather than ε. A row that leaves a level without signal is of first order in x̂_0
            either way, and is not corrected where that would need ε or bh1's infinite B.
        lower_order_final: the last p steps fall in order to 1. The very last has 1 where it ends without noise.
        disable_corrector: the numbers of the steps that are left uncorrected.
    """
    check_int("order", order, 1, 3)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    bound = check_clip(clip)
    stops = levels(schedule, steps, spacing)
    count = len(stops) - 1
    if isinstance(disable_corrector, str) or not isinstance(disable_corrector, Sequence):
        raise TypeError(f"disable_corrector must be a sequence of ints; got {type(disable_corrector).__name__}")
    left_out = {check_int("disable_corrector", step, 0, (1 << 24) - 1) for step in disable_corrector}
    orders = warm_up(stops, order)
    if lower_order_final:
        orders = [min(n, count - i) for i, n in enumerate(orders)]
    corrects = [i > 0 and i - 1 not in left_out for i in range(count)] + [False]
    if stops[-1].sigma == 0:
        orders[-1] = 1
        if predict_x0:  # the last x' is x̂_0, whatever the corrected x
            corrects[count - 1] = False
    if stops[0].alpha == 0 and (solver_type == "bh1" or not predict_x0):
        corrects[1] = False  # B(h) = h is infinite; and ε integrates nothing from there
    make_step = data_step if predict_x0 else noise_step
    few = "midpoint" if solver_type == "bh2" else "bh1"

    rows = []
    spans = [max(orders[i] - 1, orders[i - 1] if corrects[i] else 0) for i in range(count)]
    for i, (reads, write) in enumerate(history(spans)):
        here, there = stops[i], stops[i + 1]
        output = model_terms(not predict_x0, prediction, here, bound)
        x = {"x": 1.0}
        if corrects[i]:
            start, used = stops[i - 1], orders[i - 1]
            step = make_step(start, here, used, few if used == 1 else "exact")
            nodes = [node(stops[i - 1 - k], start, here) for k in range(1, used)]
            *before, now = step.outputs([*nodes, 1.0])
            x = blend((step.keep, {"anchor": 1.0}), (now, output), *past(before))
        if not predict_x0 and here.alpha == 0:
            rows.append(make_row(here, prediction, bound, first_step(here, there), reads=reads))
            continue
        used = orders[i] - 1
        step = make_step(here, there, used, few if used == 1 else "exact")
        now, *before = step.outputs([node(stops[i - k], here, there) for k in range(1, used + 1)])
        following = blend((step.keep, x), (now, output), *past(before))
        anchor = x if corrects[i + 1] else None
        rows.append(make_row(here, prediction, bound, following, anchor=anchor, slot=output, reads=reads, write=write))
    return Plan(tuple(rows), name="unipc", init_sigma=init_sigma(stops[0]))
