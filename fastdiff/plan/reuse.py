"""Rows that take the network's last output, or its last deep features, instead of a call; and which rows do so best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fastdiff.checks import check_int, kind_of
from fastdiff.plan.row import KINDS, Reuse, Row

if TYPE_CHECKING:
    from fastdiff.plan.plan import Plan


def reused(
    rows: Sequence[Row], chosen: Sequence[int] | None, every: int | None, kind: Reuse, branch: int
) -> tuple[Row, ...]:
    """The rows of ``Plan.reuse``."""
    if (chosen is None) == (every is None):
        raise ValueError("give either rows, the numbers of those that reuse, or every, one call in so many")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    check_int("branch", branch, 0, (1 << 24) - 1)
    if every is not None:
        calling = [i for i, row in enumerate(rows) if row.calls_model]
        kept = set(calling[:: check_int("every", every, 1, 1 << 24)])
        changes = {i: None if i in kept else kind for i in calling}
    else:
        if isinstance(chosen, (str, bytes)) or not isinstance(chosen, Sequence):
            raise TypeError(f"rows must be a sequence of rows' numbers; got {kind_of(chosen)}")
        changes = dict.fromkeys([check_int(f"rows[{k}]", i, 0, len(rows) - 1) for k, i in enumerate(chosen)], kind)
    for i in changes:
        if not rows[i].calls_model:
            raise ValueError(f"row {i} makes no network call, so it has no output to take again")
    return tuple(
        replace(row, reuse=changes[i], branch=branch if changes[i] == "deep" else 0) if i in changes else row
        for i, row in enumerate(rows)
    )


def check_sources(rows: Sequence[Row]) -> None:
    """ValueError where a row reuses what no row before it made, or where deep rows have several branches."""
    called = whole = False
    branches = dict[int, int]()
    for i, row in enumerate(rows):
        if (row.reuse == "output" and not called) or (row.reuse == "deep" and not whole):
            what, whole_one = ("an output", "") if row.reuse == "output" else ("deep features", "whole ")
            raise ValueError(f"row {i} reuses {what}, but no row before it calls the {whole_one}network")
        if row.reuse == "deep":
            branches.setdefault(row.branch, i)
        called = called or row.runs_network
        whole = whole or (row.calls_model and row.reuse is None)
    if len(branches) > 1:
        told = ", ".join(f"{branch} in row {i}" for branch, i in branches.items())
        raise ValueError(f"rows that reuse deep features must have one branch; got {told}")


def sources(rows: Sequence[Row]) -> tuple[int | None, ...]:
    """Of each row that reuses, the row whose output or deep features it takes; None of the others."""
    output = whole = None
    found = list[int | None]()
    for i, row in enumerate(rows):
        found.append(output if row.reuse == "output" else whole if row.reuse == "deep" else None)
        if row.runs_network:
            output = i
            whole = i if row.reuse is None else whole
    return tuple(found)


def choose_reused(
    plan: Plan, calls: int, error: Callable[[Plan], float], *, kind: Reuse = "output", branch: int = 0
) -> list[tuple[Plan, float]]:
    """Which rows to reuse, chosen greedily: of the calls that are left, again and again the one that costs least.

        teacher = fastdiff.sample(model, shape, sampler=fine, seed=1)    # held out: the plan was made for another seed

        def error(plan):
            return (fastdiff.sample(model, shape, sampler=plan, seed=1) - teacher).square().mean().sqrt().item()

        plan, found = choose_reused(plan, 8, error)[-1]

    Args:
        plan: what to begin with; rows that it reuses stay so.
        calls: of the whole network, how many to leave.
        error: of a plan, to a teacher's result; NaN counts as infinite. It is asked about n²/2 times to leave few of n.
        kind, branch: as ``Plan.reuse`` has them.

    Returns:
        The plans on the way and their errors: from ``plan`` itself on, one call fewer each, to ``calls``. Equal errors
        leave the earlier row.

    Raises:
        TypeError, ValueError: for a number of calls below 1 or above the plan's, and as ``Plan.reuse`` does.
    """
    check_int("calls", calls, 1, plan.calls)
    if not callable(error):
        raise TypeError(f"error must be a function of a plan; got {kind_of(error)}")
    found = [(plan, _measured(error, plan))]
    while plan.calls > calls:
        left = [i for i, row in enumerate(plan) if row.calls_model and row.reuse is None]
        tried = [plan.reuse([i], kind=kind, branch=branch) for i in left[1:]]  # the first call has none before it
        errors = [_measured(error, candidate) for candidate in tried]
        best = min(range(len(errors)), key=errors.__getitem__)
        plan = tried[best]
        found.append((plan, errors[best]))
    return found


def _measured(error: Callable[[Plan], float], plan: Plan) -> float:
    value = float(error(plan))
    return math.inf if math.isnan(value) else value
