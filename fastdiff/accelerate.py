"""accelerate: what can be made faster in an object of another library, put in place; restore takes it out again."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

_RECORD = "_fastdiff_accelerated"  # on the object itself: nothing global is touched


@dataclass(frozen=True)
class Accelerated:
    """What ``accelerate`` changed; print it.

    Attributes:
        what: the class of the accelerated object.
        changed: the class before and the class after, by the component's name.
        kept: the class of each component that could have been changed in kind, but that fastdiff does not have.
    """

    what: str
    changed: dict[str, tuple[str, str]]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.what}:"]
        lines += [f"  {name}: {before} -> {after}" for name, (before, after) in self.changed.items()]
        lines += [f"  {name}: {kept}, as it was" for name, kept in self.kept.items()]
        return "\n".join(lines)


def accelerate(target: Any) -> Accelerated:
    """Make a diffusers pipeline faster, in place: its schedulers become fastdiff's, of the same config and tables.

    Images are the same to rounding, for the same generator; ``fastdiff.integrations.diffusers`` says where a scheduler
    differs on purpose. ``restore`` puts the very same objects back.

    Args:
        target: a diffusers.DiffusionPipeline.

    Returns:
        What was changed, for printing.

    Raises:
        TypeError: for anything else.
        ValueError: for a pipeline that is accelerated already, that has no scheduler, or none of a class that fastdiff
            has; for a config option that fastdiff does not serve, by name.
    """
    _check_pipeline(target)
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from fastdiff.integrations import diffusers as ours

    if _RECORD in target.__dict__:
        raise ValueError(f"this {type(target).__name__} is accelerated already; restore it first")
    schedulers = {name: value for name, value in target.components.items() if isinstance(value, SchedulerMixin)}
    if not schedulers:
        raise ValueError(f"this {type(target).__name__} has no scheduler, and nothing else of it is accelerated yet")
    made = {name: ours.like(scheduler) for name, scheduler in schedulers.items()}
    if not any(made.values()):
        found = ", ".join(f"{name} is {_name(value)}" for name, value in schedulers.items())
        raise ValueError(f"fastdiff has no scheduler for this {type(target).__name__}: {found}")
    changed = {name: (schedulers[name], new) for name, new in made.items() if new is not None}
    for name, (_, new) in changed.items():
        setattr(target, name, new)
    target.__dict__[_RECORD] = changed
    return Accelerated(
        _name(target),
        {name: (_name(old), _name(new)) for name, (old, new) in changed.items()},
        {name: _name(schedulers[name]) for name, new in made.items() if new is None},
    )


def restore(target: Any) -> None:
    """Undo ``accelerate``: every component is the object that it was.

    Raises:
        TypeError: for anything but a diffusers pipeline.
        ValueError: for one that is not accelerated, or a component of which was replaced since.
    """
    _check_pipeline(target)
    changed = target.__dict__.get(_RECORD)
    if changed is None:
        raise ValueError(f"this {type(target).__name__} is not accelerated")
    for name, (_, new) in changed.items():
        if getattr(target, name) is not new:
            raise ValueError(
                f"{name} was replaced since accelerate, by {_name(getattr(target, name))}; put it back first"
            )
    for name, (old, _) in changed.items():
        setattr(target, name, old)
    del target.__dict__[_RECORD]


def _check_pipeline(target: Any) -> None:
    diffusers = sys.modules.get("diffusers")  # whoever has a pipeline has imported it
    if diffusers is None or not isinstance(target, diffusers.DiffusionPipeline):
        raise TypeError(f"accelerate and restore take a diffusers pipeline; got {type(target).__name__}")


def _name(value: Any) -> str:
    return f"{type(value).__module__.split('.')[0]}.{type(value).__name__}"
