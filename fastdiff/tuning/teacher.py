"""The fine solution that learning aims at: its steps, found by doubling, and where it takes every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.plan.plan import Plan
from fastdiff.tuning.runs import Runs

FIRST, MOST = 32, 1024  # steps
FINE = 0.02  # of the start's error: what doubling a teacher's steps may change, about a tenth of a tuned plan's


@dataclass(frozen=True)
class Teacher:
    """A fine plan, its sampler's steps, and by how much its result moved when these were last doubled; None where the
    plan, or the steps, were given.
    """

    plan: Plan
    steps: int | None = None
    moved: float | None = None


def doubled(runs: Runs, make: Callable[[int], Plan], start: Plan, held_out: int, device: torch.device) -> Teacher:
    """The teacher whose steps were doubled until that moved its result by at most ``FINE`` of the start's error.

    That a tuned plan's error is ten times as large is looked at when it is known (``tune``).
    """
    total = runs.shape[0]
    begin, steps = total - held_out, FIRST
    coarse = _ends(runs, make(steps), begin, total)
    from_start = runs.ends(start, begin, total)
    while True:
        plan = make(2 * steps)
        fine = _ends(runs, plan, begin, total)
        moved = runs.distance(coarse, fine, device)
        if moved <= FINE * runs.distance(from_start, fine, device) or 4 * steps > MOST:
            return Teacher(plan, 2 * steps, moved)
        coarse, steps = fine, 2 * steps


def _ends(runs: Runs, plan: Plan, begin: int, end: int) -> Tensor:
    try:
        return runs.ends(plan, begin, end)
    except FloatingPointError as error:
        raise FloatingPointError(f"the teacher's run, {plan.name!r} of {len(plan)} rows: {error}") from None


def targets(runs: Runs, teacher: Teacher) -> Tensor:
    """Where the teacher takes every sample: [N, …], float32 on the CPU."""
    return _ends(runs, teacher.plan, 0, runs.shape[0])
