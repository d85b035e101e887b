"""Where learning starts: a sampler's table, and the same table at other levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdiff.plan.plan import Plan
from fastdiff.schedules.continuous import FlowSchedule
from fastdiff.schedules.level import Level, Schedule
from fastdiff.schedules.spacing import Spacing, levels

AGREES = 1e-6  # how closely a sampler that is told its own levels by their σ must give its table back
STEP = 1e-6  # of the differences, in shares' logarithms: float64 leaves nine digits of them
LEAST_SHARE = 0.01  # of a gap that the start's levels do not leave, as below a last call at the schedule's least σ
LEAST = 1e-3  # the least share of a gap, so that no two levels fall together
REACH = 2.0  # in ln(σ/α): how far above the second level it may move where the first has no signal


@dataclass(frozen=True)
class Start:
    """A sampler's plan, and how its numbers follow its levels.

    The levels are ordered by construction: between the schedule's largest and its least σ, ln(σ/α) is cut into gaps,
    and what is learned is the logarithm of each one's share (as in LD3, Tong et al. 2024). The first level stays where
    x_T is scaled by it (VE states) or has no signal. The table is

        start's + (the sampler's at these levels − the sampler's at its own)

    so that it is the start's to the bit as long as no level has moved, whatever rounding the sampler's own levels have.

    Attributes:
        plan: the sampler's plan.
        rebuild: the plan at other σ; None where the sampler cannot be told any, or is a plan: its levels stay.
        gaps: the start's gaps in ln(σ/α) from ``top`` down; empty where the levels stay.
        first: σ of the first level, where it stays.
        last: σ of the level after the last row.
    """

    plan: Plan
    rebuild: Callable[[Sequence[float]], Plan] | None = None
    gaps: tuple[float, ...] = ()
    top: float = 0.0
    first: float | None = None
    last: float = 0.0
    is_flow: bool = False

    def sigmas(self, shares: Tensor) -> list[float]:
        """The σ of every level, as the schedule counts them, for logarithms of shares [gaps]."""
        logs = torch.tensor(self.gaps, dtype=torch.float64, device="cpu").log() + shares
        least = min(LEAST, 0.1 / len(logs))
        gaps = (torch.softmax(logs, 0) * (1 - least * len(logs)) + least) * sum(self.gaps)
        ratios = (self.top - gaps.cumsum(0)[:-1]).exp().tolist()
        found = [ratio / (1 + ratio) for ratio in ratios] if self.is_flow else ratios
        return [*([] if self.first is None else [self.first]), *found, self.last]

    def at(self, shares: Tensor) -> Plan:
        """The sampler's own plan at these levels."""
        return _rebuilt(self, tuple(shares.tolist()))

    def table(self, shares: Tensor | None) -> Tensor:
        """The table, float64 [rows, columns], with its gradient by the shares, by differences in float64.

        A sampler is a function of Python's floats, and a plan of ten rows is made in a few milliseconds.
        """
        if shares is None or self.rebuild is None:
            return self.plan.table().clone()
        return _Table.apply(shares, self)


@lru_cache(maxsize=8)
def _rebuilt(start: Start, shares: tuple[float, ...]) -> Plan:
    assert start.rebuild is not None
    return start.rebuild(start.sigmas(torch.tensor(shares, dtype=torch.float64, device="cpu")))


class _Table(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shares: Tensor, start: Start) -> Tensor:
        ctx.start, ctx.shares = start, shares.detach().clone()
        ctx.here = start.at(ctx.shares).table()
        moved = ctx.here - start.at(torch.zeros_like(ctx.shares)).table()
        return start.plan.table() + moved.nan_to_num(0.0, 0.0, 0.0)  # of infinite clips

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        found = []
        for i in range(len(ctx.shares)):
            step = torch.zeros_like(ctx.shares)
            step[i] = STEP
            slope = (ctx.start.at(ctx.shares + step).table() - ctx.here) / STEP
            found.append((slope.nan_to_num(0.0, 0.0, 0.0) * grads[0]).sum())  # an infinite clip's difference is NaN
        return torch.stack(found), None


def movable(plan: Plan, make: Callable[[Spacing], Plan], schedule: Schedule, steps: int, spacing: Any) -> Start:
    """The start of a sampler's plan; with levels that move if ``make``, told the plan's own σ, gives it back."""
    is_flow = isinstance(schedule, FlowSchedule)

    def rebuild(sigmas: Sequence[float]) -> Plan:
        return make(Spacing(sigmas=tuple(sigmas), quantize=Spacing.of(spacing).quantize))

    for stops in _candidates(plan, schedule, steps, spacing):
        sigmas = [_sigma(level, is_flow) for level in stops]
        try:
            again = rebuild(sigmas)
        except (TypeError, ValueError):
            continue
        if len(again) == len(plan) and _agree(again.table(), plan.table()):
            return _with_gaps(plan, rebuild, sigmas, schedule, is_flow)
    return Start(plan)


def _candidates(plan: Plan, schedule: Schedule, steps: int, spacing: Any) -> list[list[Level]]:
    """Lists of levels that the sampler may stop at: its spacing's, or those of its rows."""
    found = []
    with suppress(TypeError, ValueError):
        found.append(levels(schedule, steps, spacing))
    called = [Level(float(row.t), row.alpha, row.sigma) for row in plan if row.calls_model]
    return [*found, [*called, schedule.at(0.0)]]


def _with_gaps(plan: Plan, rebuild: Any, sigmas: list[float], schedule: Schedule, is_flow: bool) -> Start:
    called = [_log(sigma, is_flow) for sigma in sigmas[:-1]]
    least = min(_log(max(schedule.sigma_min, 1e-6), is_flow), called[-1])
    top, first = _log(schedule.sigma_max, is_flow), None
    if plan.init_sigma != 1 or math.isinf(called[0]) or math.isinf(top):
        first, top = sigmas[0], called[0]
        called = called[1:]
        if math.isinf(top):
            top = (called[0] if called else least) + REACH
    bounds = [max(top, called[0]) if called else top, *called, least]
    gaps = [a - b for a, b in pairwise(bounds)]
    if len(gaps) < 2:
        return Start(plan)
    smallest = LEAST_SHARE * (bounds[0] - least) / len(gaps)
    gaps = [max(gap, smallest) for gap in gaps]
    whole = (bounds[0] - least) / sum(gaps)
    return Start(plan, rebuild, tuple(whole * gap for gap in gaps), bounds[0], first, sigmas[-1], is_flow)


def _sigma(level: Level, is_flow: bool) -> float:
    return level.sigma if is_flow else level.ratio


def _log(sigma: float, is_flow: bool) -> float:
    """ln(σ/α) of a level by its σ."""
    if is_flow:
        return math.log(sigma / (1 - sigma)) if 0 < sigma < 1 else math.inf if sigma else -math.inf
    return math.log(sigma) if sigma else -math.inf


def _agree(a: Tensor, b: Tensor) -> bool:
    same = a == b  # infinities among them
    return bool((same | ((a - b).abs() <= AGREES * (1 + b.abs()))).all())
