"""Schedules by name."""

from __future__ import annotations

from typing import Any

from fastdiff.checks import nearest
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.level import Schedule

# Made once, in a fraction of a millisecond: torch.compile could not trace their making.
TABLES = {
    name: getattr(NoiseSchedule, name)() for name in ("linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_betas")
}
NAMED: dict[str, Schedule] = {**TABLES, "edm": EDMSchedule(), "flow": FlowSchedule()}


def resolve_table(schedule: Any) -> NoiseSchedule:
    """A NoiseSchedule as it is, or a named one with its default numbers."""
    if isinstance(schedule, NoiseSchedule):
        return schedule
    if isinstance(schedule, str):
        if schedule not in TABLES:
            raise ValueError(f"schedule is {schedule!r}" + nearest(schedule, tuple(TABLES)))
        return TABLES[schedule]
    raise TypeError(f"schedule must be a NoiseSchedule or a name; got {type(schedule).__name__}")


def resolve_schedule(schedule: Any) -> Schedule:
    """Any schedule as it is, or a named one with its default numbers: those of NoiseSchedule, "edm" and "flow"."""
    if isinstance(schedule, str):
        if schedule not in NAMED:
            raise ValueError(f"schedule is {schedule!r}" + nearest(schedule, tuple(NAMED)))
        return NAMED[schedule]
    if isinstance(schedule, Schedule):
        return schedule
    raise TypeError(f"schedule must be a NoiseSchedule, EDMSchedule, FlowSchedule or a name; "
                    f"got {type(schedule).__name__}")  # fmt: skip
