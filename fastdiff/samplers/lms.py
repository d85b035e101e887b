"""The linear multistep method of k-diffusion (Adams & Bashforth's with steps of any size)."""

from __future__ import annotations

from fastdiff.checks import check_clip, check_int
from fastdiff.plan.plan import Plan
from fastdiff.samplers.exponential import blend, history, init_sigma, make_row, model_terms, past, warm_up, weights
from fastdiff.samplers.stages import moved
from fastdiff.schedules.level import Schedule, check_schedule
from fastdiff.schedules.spacing import Spacing, levels


def lms(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    order: int = 4,
    ve: bool = True,
) -> Plan:
    """x'/α' = x/α + ∫ ε dρ over ρ = σ/α, ε the polynomial in ρ through the last ``order`` outputs, integrated exactly.

    In k-diffusion's states x_0 + σ ε this is dx/dσ = ε, and ε their derivative d.

    Args:
        order: 1 (Euler) to 4; row i has at most i + 1. A row that leaves a level without signal has 1, and no later row
            reads it.
        ve: k-diffusion's states; False has those of the schedule, with the same images.
    """
    check_int("order", order, 1, 4)
    bound = check_clip(clip)
    stops = levels(check_schedule(schedule).as_ve() if ve else schedule, steps, spacing)
    rows = []
    spans = [n - 1 for n in warm_up(stops, order)]
    for i, (reads, write) in enumerate(history(spans)):
        here, there = stops[i], stops[i + 1]
        if here.alpha == 0:
            rows.append(make_row(here, prediction, bound, moved(here, there.alpha, there.sigma)))
            continue
        width = there.ratio - here.ratio
        nodes = [(stops[i - k].ratio - here.ratio) / width for k in range(1, spans[i] + 1)]
        integrals = weights(nodes, [1 / (k + 1) for k in range(spans[i] + 1)])
        now, *before = (there.alpha * width * value for value in integrals)
        output = model_terms(True, prediction, here, bound)
        x = blend((there.alpha / here.alpha, {"x": 1.0}), (now, output), *past(before))
        rows.append(make_row(here, prediction, bound, x, slot=output, reads=reads, write=write))
    return Plan(tuple(rows), name="lms", init_sigma=init_sigma(stops[0]))
