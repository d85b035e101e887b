"""By what a parameter of 1 changes a table: so that one learning rate serves them all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.plan.plan import COLUMNS, Plan
from fastdiff.plan.row import TERMS, Row
from fastdiff.schedules.level import Schedule
from fastdiff.tuning.history import widened

_AT = {name: i for i, name in enumerate(COLUMNS)}
OF_X = [_AT[f"x.{term}"] for term in TERMS]
STEP = 0.01  # of the way to a neighbouring row's level, by which the slope of t is taken
LEAST = 1e-2  # the least share of what a row writes, as a mean square, that an axis is stretched for


def units(plan: Plan, spread: float, learns_t: bool, schedule: Schedule) -> Tensor:
    """float64 [rows, columns], 0 where a number is not learned.

    A coefficient's unit is the size of what the row writes over the size of the term, for data of deviation
    ``spread``: a parameter of 0.01 then moves any state by about a hundredth of itself. A t's is how far it
    is to a neighbouring row's, and no more than that by its slope at the row's own level: near the top of a cosine
    schedule ln(σ/α) rises so steeply with t that a tenth of the distance would lead beyond the last timestep.

    Learned are, of x', the terms x and x̂_0, the slots of the wide history, and others that the row reads; of anchor'
    and of the slots what the row has, unless that is one term alone, whose factor is its readers' affair.
    """
    found = torch.zeros(len(plan), len(COLUMNS), dtype=torch.float64)
    for i, (row, history) in enumerate(zip(plan, widened(plan), strict=True)):
        following = plan[i + 1] if i + 1 < len(plan) else None
        size = {term: spread for term in ("x0", "slot0", "slot1", "slot2")}
        size |= {"x": math.hypot(row.alpha * spread, row.sigma), "m": 1.0}
        size["anchor"] = size["x"]
        written = spread if following is None else math.hypot(following.alpha * spread, following.sigma)
        terms = {"x", "x0", *(f"slot{k}" for k in range(len(history.reads)))} | set(row.x)
        for term in terms & set(size):
            found[i, _AT[f"x.{term}"]] = written / size[term]
        for output, coefficients in (("anchor", row.anchor), ("slot", row.slot)):
            read = [term for term, value in (coefficients or {}).items() if value and term in size]
            for term in read if len(read) > 1 else ():
                found[i, _AT[f"{output}.{term}"]] = size["x" if output == "anchor" else "x0"] / size[term]
        if learns_t and row.runs_network:
            near = [_distance(row, plan[j], schedule) for j in (i - 1, i + 1) if 0 <= j < len(plan)]
            found[i, _AT["t"]] = min((gap for gap in near if gap), default=0.1 * abs(row.t))
    return found


def terms_of(units: Tensor, row: int) -> list[int]:
    """The columns of the terms of a row's x' whose coefficients are learned."""
    return [column for column in OF_X if units[row, column]]


@dataclass(frozen=True)
class Moments:
    """What a row was seen to write, as a root of a mean square, and the mean products [K, K] of its ``terms_of``."""

    written: float
    products: Tensor


def directions(units: Tensor, moments: Mapping[int, Moments]) -> Tensor:
    """float64 [parameters, rows, columns]: by what a parameter of 1 changes the table; one number's unit each, but for
    the coefficients of x' in the rows that ``moments`` has.

    The terms of a row are nearly the same: x̂_0 of this call and of the three before. One coefficient alone moves their
    sum far, where the table was right already, and their differences, which make a method of higher order, hardly;
    in these coordinates Adam, which has a step for each, ends far from the least error. There a parameter goes along an
    axis in which the terms, in their units, are uncorrelated, stretched until a parameter of 1 moves x' by as much as
    the row writes; by less along an axis that hardly moves it at all (``LEAST``).

    Args:
        units: [rows, columns].
        moments: by row, as measured in the start's runs.
    """
    found = []
    for i, row in enumerate(units):
        columns = terms_of(units, i) if i in moments else []
        if columns:
            sizes = row[columns]
            shares, axes = torch.linalg.eigh(moments[i].products * sizes[:, None] * sizes / moments[i].written ** 2)
            changes = sizes[:, None] * axes / (shares.clamp(min=0) + LEAST).sqrt()
            for change in changes.T:
                found.append(torch.zeros_like(units))
                found[-1][i, columns] = change
        for column in row.nonzero().flatten().tolist():
            if column not in columns:
                found.append(torch.zeros_like(units))
                found[-1][i, column] = row[column]
    return torch.stack(found) if found else units.new_zeros(0, *units.shape)


def _distance(row: Row, other: Row, schedule: Schedule) -> float:
    """From a row's t to another's, or by its slope in ln(σ/α) at the row's level where that is less."""
    apart = abs(row.t - other.t)
    if all(level.alpha and level.sigma for level in (row, other)):
        own, far = row.sigma / row.alpha, other.sigma / other.alpha
        with suppress(ValueError):  # levels that the schedule does not have
            moved = schedule.at_ratio(own ** (1 - STEP) * far**STEP).t - schedule.at_ratio(own).t
            return min(apart, abs(moved) / STEP)
    return apart
