"""The plans that ``tune``'s arguments ask for: the start, the teacher, and the samplers beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.checks import check_int
from fastdiff.plan.plan import Plan
from fastdiff.samplers.resolve import Sampler, resolve_plan
from fastdiff.schedules.continuous import FlowSchedule
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.spacing import Spacing
from fastdiff.tuning.runs import Runs
from fastdiff.tuning.start import Start, movable
from fastdiff.tuning.teacher import FIRST, Teacher, doubled

HIGH = 80.0  # σ that the start's levels begin at where nothing else is said (Karras et al. 2022, Table 1)


@dataclass(frozen=True)
class Walked:
    """The schedule, and what plans on it share.

    Attributes:
        options: of ``resolve_plan``, for the start, the teacher and the samplers beside them.
        whole: the network takes whole timesteps alone, so levels lie at these.
    """

    schedule: Schedule
    options: Mapping[str, Any]
    whole: bool = False

    def start(self, sampler: Sampler, steps: int, spacing: Any, sampler_options: Any) -> Start:
        """The sampler's plan, and how it follows its levels."""
        if isinstance(sampler, Plan):
            if (calls := calls_of(sampler)) != steps:
                raise ValueError(f"start is a Plan of {calls} network calls; steps is {steps}")
            return Start(sampler)

        def make(chosen: Any) -> Plan:
            count = None if isinstance(chosen, Spacing) and chosen.lists else steps
            return resolve_plan(sampler, count, spacing=chosen, sampler_options=sampler_options, **self.options)

        if spacing is None:
            spacing = self.between(min(self.schedule.sigma_max, HIGH), steps)
            try:
                make(spacing)
            except ValueError:  # it cannot be told its σ, or something else is wrong, which its own levels will say
                spacing = None
        return movable(make(spacing), make, self.schedule, steps, spacing)

    def fine(self, sampler: Sampler, start: Plan, steps: int) -> Plan:
        """Another sampler's plan of so many steps, from the start's first level to the least σ; a flow's levels are its
        own.
        """
        first = start[0].sigma / start[0].alpha if start[0].alpha else min(self.schedule.sigma_max, HIGH)
        spacing = self.between(first, steps)
        return resolve_plan(sampler, steps if spacing is None else None, spacing=spacing, **self.options)

    def teacher(self, sampler: Sampler, start: Plan, steps: int | None) -> Plan:
        """The teacher's plan; of so many steps unless it is a Plan."""
        return sampler if isinstance(sampler, Plan) else self.fine(sampler, start, steps or FIRST)

    def between(self, first: float, steps: int) -> Spacing | None:
        if isinstance(self.schedule, FlowSchedule):
            return None
        return Spacing(sigmas=karras(first, self.schedule.sigma_min, steps), quantize=self.whole)


def check_learnable(plan: Plan) -> None:
    """ValueError for a plan whose end is no function of x_T, or that learning cannot run."""
    for i, row in enumerate(plan):
        if row.uses("z"):
            raise ValueError(
                f"start is {plan.name!r}, whose row {i} adds noise: where it ends is no function of x_T, which a "
                "teacher could be followed by; take a sampler without noise, such as 'dpmpp_2m' or 'ddim'"
            )
        if row.uses("g"):
            raise ValueError(f"start is {plan.name!r}, whose row {i} reads a classifier's gradient; leave it out")
        if row.reuse == "deep":
            raise ValueError(
                f"start is {plan.name!r}, whose row {i} takes deep features again, which have no gradient here; it may "
                'take outputs again (kind="output")'
            )
    if plan[-1].sigma > plan[0].sigma:
        raise ValueError(f"start is {plan.name!r}, which leads to noise, not to an image")
    if not any(row.calls_model for row in plan):
        raise ValueError(f"start is {plan.name!r}, which never calls the network")


def taught_by(
    runs: Runs, walked: Walked, sampler: Sampler, steps: int | None, start: Plan, held_out: int, device: torch.device
) -> Teacher:
    """The teacher that was asked for, its steps doubled as far as need be where they were not given."""

    def make(count: int) -> Plan:
        return walked.fine(sampler, start, count)

    if isinstance(sampler, Plan):
        return Teacher(sampler)
    return doubled(runs, make, start, held_out, device) if steps is None else Teacher(make(steps), steps)


def check_teacher(walked: Walked, sampler: Sampler, steps: int | None, start: Plan) -> None:
    """ValueError for a teacher that cannot be followed."""
    if steps is not None:
        check_int("teacher_steps", steps, 1, 1 << 20)
        if isinstance(sampler, Plan):
            raise ValueError("teacher is a Plan, which fixes teacher_steps; leave it out")
    try:
        check_learnable(walked.teacher(sampler, start, steps))
    except ValueError as error:
        raise ValueError(f"teacher: {str(error).removeprefix('start is ')}") from None


def karras(high: float, low: float, steps: int, rho: float = 7.0) -> tuple[float, ...]:
    """σ from high to low, and 0 (Karras et al. 2022, Equation 5)."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    shares = [i / (steps - 1) for i in range(1, steps - 1)]
    return (*[high, *((a + u * (b - a)) ** rho for u in shares), low][:steps], 0.0)


def calls_of(plan: Plan) -> int:
    return sum(row.runs_network for row in plan)


def ratios_of(plan: Plan) -> list[float | None]:
    return [row.sigma / row.alpha if row.alpha else None for row in plan if row.runs_network]
