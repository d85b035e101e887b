"""iPNDM (Zhang & Chen 2023, improving Liu et al. 2022): PNDM's multistep rule, begun by its own lower orders."""

from __future__ import annotations

from fastdiff.checks import check_clip, check_int
from fastdiff.plan.plan import Plan
from fastdiff.samplers.exponential import (
    blend,
    first_step,
    history,
    init_sigma,
    make_row,
    model_terms,
    past,
    warm_up,
)
from fastdiff.samplers.pndm import ADAMS_BASHFORTH
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.spacing import Spacing, levels


def ipndm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    order: int = 4,
) -> Plan:
    """x' = (α'/α) x + (σ' − α' σ/α) e, with e = (55 ε_i − 59 ε_{i−1} + 37 ε_{i−2} − 9 ε_{i−3})/24 (Liu et al. 2022).

    The first rows have Adams & Bashforth's weights of order 1, 2 and 3 in place of PNDM's Heun or Runge–Kutta start, so
    that every row makes one network call. The weights are those of equal steps in σ/α, whatever the steps are; ``lms``
    has the weights of its own steps. A level without signal is left by a step of DDIM, which no later row reads.

    It is the rule of ComfyUI's and diffusers' iPNDM; diffusers' IPNDMScheduler walks a schedule of its own with it.

    Args:
        order: 1 (DDIM) to 4.
    """
    check_int("order", order, 1, 4)
    bound = check_clip(clip)
    stops = levels(schedule, steps, spacing)
    rows = []
    orders = warm_up(stops, order)
    for i, (reads, write) in enumerate(history([n - 1 for n in orders])):
        here, there = stops[i], stops[i + 1]
        if here.alpha == 0:
            rows.append(make_row(here, prediction, bound, first_step(here, there)))
            continue
        push = there.sigma - there.alpha * here.ratio
        now, *before = (push * weight for weight in ADAMS_BASHFORTH[orders[i] - 1])
        output = model_terms(True, prediction, here, bound)
        x = blend((there.alpha / here.alpha, {"x": 1.0}), (now, output), *past(before))
        rows.append(make_row(here, prediction, bound, x, slot=output, reads=reads, write=write))
    return Plan(tuple(rows), name="ipndm", init_sigma=init_sigma(stops[0]))
