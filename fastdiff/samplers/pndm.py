"""PNDM (Liu et al. 2022): DDIM's transfer of a state, driven by a linear multistep combination of past outputs."""

from __future__ import annotations

import math
from typing import Any

from fastdiff.checks import check_choice, check_clip
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.exponential import blend, first_step, init_sigma, make_row, model_terms
from fastdiff.schedules.level import Level, Schedule, epsilon_terms
from fastdiff.schedules.spacing import Spacing, levels

# Adams & Bashforth's weights of the newest output, the one before it, … at equal steps, whatever the steps are.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
AVERAGES = ("epsilon", "output")


def pndm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    skip_prk_steps: bool = True,
    averages: str = "epsilon",
) -> Plan:
    """x' = (α'/α) x + (σ' − α' σ/α) e, with e = (55 e_i − 59 e_{i−1} + 37 e_{i−2} − 9 e_{i−3})/24 (Equations 11, 12).

    PLMS (``skip_prk_steps``, as in latent diffusion) starts with Heun's rule: its second row, at the next level, mends
    the first step with the mean of both outputs and is then forgotten; two rows of lower order follow. Otherwise
    three steps of a Runge–Kutta rule, four calls each (Equation 13), give the first outputs. A level without signal is
    left by a step of DDIM, and the start begins after it.

    Args:
        steps: None visits every timestep of a NoiseSchedule. PLMS makes one network call more than ``steps``,
            Runge–Kutta nine more; levels between two stops lie halfway in t, rounded down between two integers.
        spacing: where to stop, a name or a ``Spacing``; None is the schedule's own: trailing, or karras for EDM. Latent
            diffusion ends at ``Spacing(final="sigma_min")``.
        skip_prk_steps: start with Heun's rule; False starts with Runge–Kutta's, as in the paper.
        averages: "epsilon": e is a combination of predicted ε, as published. "output": of the network's outputs as
            they are, turned to ε by the current x, as diffusers does; the same for prediction="epsilon".

    Raises:
        TypeError, ValueError: for arguments outside these; fewer than 4 steps with the Runge–Kutta start.
    """
    check_choice("averages", averages, AVERAGES)
    if not isinstance(skip_prk_steps, bool):
        raise TypeError(f"skip_prk_steps must be a bool; got {type(skip_prk_steps).__name__}")
    bound = check_clip(clip)
    if averages == "output" and math.isfinite(bound):
        raise ValueError("averages='output' goes without clip, which bounds what ε is derived from")
    stops = levels(schedule, steps, spacing)
    count = len(stops) - 1
    rows: list[Row] = []
    if stops[0].alpha == 0:
        rows.append(make_row(stops[0], prediction, bound, first_step(stops[0], stops[1])))
        stops, count = stops[1:], count - 1
    if not skip_prk_steps and count < 4:
        raise ValueError(f"the Runge–Kutta start takes three steps and PLMS one: steps must be at least 4; got {count}")

    def output(level: Level) -> dict[str, float]:
        return {"m": 1.0} if averages == "output" else model_terms(True, prediction, level, bound)

    def moved(here: Level, there: Level, start: str, *parts: tuple[float, dict[str, float]]) -> dict[str, float]:
        """The state at ``there`` from ``start``, "x" or "anchor", at ``here``."""
        mean = blend(*parts)
        if averages == "output":
            as_epsilon = epsilon_terms(prediction, here)
            mean = blend((as_epsilon.get("m", 0.0), mean), (as_epsilon.get("x", 0.0), {start: 1.0}))
        push = there.sigma - there.alpha * here.ratio
        return blend((there.alpha / here.alpha, {start: 1.0}), (push, mean))

    def row(level: Level, x: dict[str, float], **more: Any) -> Row:
        return make_row(level, prediction, bound, x, **more)

    begun = len(rows)
    if skip_prk_steps and count > 1:
        here, there = stops[:2]
        first, second = output(here), output(there)
        rows += [
            row(here, moved(here, there, "x", (1.0, first)), anchor={"x": 1.0}, slot=first, write=0),
            row(there, moved(here, there, "anchor", (0.5, second), (0.5, {"slot0": 1.0})), reads=(0,)),
        ]
    elif not skip_prk_steps:
        for i in range(3):
            here, there = stops[i], stops[i + 1]
            middle = _halfway(schedule, here, there)
            first, second, third, fourth = (output(level) for level in (here, middle, middle, there))
            start, total = {"slot0": 1.0}, {"slot0": 1.0}  # slot i keeps the first output, slot 3 the sum so far
            rows += [
                row(here, moved(here, middle, "x", (1.0, first)), anchor={"x": 1.0}, slot=first, write=i),
                row(
                    middle, moved(here, middle, "anchor", (1.0, second)),
                    slot=blend((1 / 6, start), (1 / 3, second)), reads=(i,), write=3,
                ),
                row(
                    middle, moved(here, there, "anchor", (1.0, third)),
                    slot=blend((1.0, total), (1 / 3, third)), reads=(3,), write=3,
                ),
                row(there, moved(here, there, "anchor", (1.0, total), (1 / 6, fourth)), reads=(3,)),
            ]  # fmt: skip
    done = 0 if len(rows) == begun else 1 if skip_prk_steps else 3
    for i in range(done, count):
        here, there = stops[i], stops[i + 1]
        now, *before = ADAMS_BASHFORTH[min(i, 3)]
        parts = [(now, output(here)), *((value, {f"slot{k}": 1.0}) for k, value in enumerate(before))]
        reads = tuple((i - k) % 3 for k in range(1, len(before) + 1))
        wanted = i + 1 < count
        rows.append(
            row(here, moved(here, there, "x", *parts), slot=output(here), reads=reads, write=i % 3 if wanted else None)
        )
    return Plan(tuple(rows), name="pndm", init_sigma=1.0 if begun else init_sigma(stops[0]))


def _halfway(schedule: Schedule, here: Level, there: Level) -> Level:
    """The level halfway in t between two; at an index of a table where both are."""
    t = (here.t + there.t) / 2
    whole = isinstance(here.t, int) and isinstance(there.t, int)
    return schedule.level(math.floor(t) if schedule.table_length is not None and whole else t)
