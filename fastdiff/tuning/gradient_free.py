"""Levels from a network's outputs alone: CMA-ES (Hansen 2016), by the library cma."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fastdiff.plan.plan import Plan
from fastdiff.tuning.task import Task

SPREAD = 0.3  # of the first generation's logarithms of shares


def optimiser() -> Any:
    """The library cma; ImportError that names the extra where it is missing."""
    try:
        import cma
    except ImportError as error:
        raise ImportError('gradient_free searches by cma: pip install "fastdiff-torch[tune]"') from error
    return cma


def search(task: Task) -> tuple[Plan, str]:
    """The best plan on held-out noise, its levels searched for by their errors on the samples to learn from."""
    start, runs = task.start, task.runs
    best, least = start.plan, task.error(start.plan)

    def plan_at(shares: Any) -> Plan | None:
        try:
            plan = start.at(torch.tensor(shares, dtype=torch.float64))
        except ValueError:  # two levels on one timestep
            return None
        return plan if len(plan) == len(start.plan) else None  # quantised levels that fell on one timestep are merged

    def error_of(plan: Plan | None) -> float:
        if plan is None:
            return float("inf")
        try:
            ends = runs.ends(plan, 0, task.images)
        except FloatingPointError:
            return float("inf")
        return runs.distance(ends, task.ends[: task.images], task.device)

    options = {"seed": runs.seed % (2**31 - 1) + 1, "verbose": -9, "maxfevals": task.iterations}
    strategy = optimiser().CMAEvolutionStrategy([0.0] * len(start.gaps), SPREAD, options)
    bar, done = task.bar(), False
    try:
        while not done and not strategy.stop():
            asked = strategy.ask()
            plans = [plan_at(shares) for shares in asked]
            errors = []
            for plan in plans:
                errors.append(error_of(plan))
                done = next(bar, None) is None or done
            strategy.tell(asked, errors)
            candidate = plans[min(range(len(errors)), key=errors.__getitem__)]
            if candidate is not None and (error := task.error(candidate)) < least:
                best, least = candidate, error
    except KeyboardInterrupt:
        warnings.warn(f"interrupted: the plan is the best of the search up to then, error {least:.3g}", stacklevel=3)
    return best, "levels"
