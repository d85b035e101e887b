"""The plan that ``fastdiff.sample``'s arguments ask for: of a Plan, of a sampler's name, or of a sampler's function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from fastdiff.checks import nearest
from fastdiff.plan.plan import Plan
from fastdiff.samplers import SAMPLERS
from fastdiff.samplers.names import understood
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.resolve import resolve_schedule
from fastdiff.schedules.spacing import FIELDS, Spacing, gathered

Sampler = str | Plan | Callable[..., Plan]


def resolve_plan(
    sampler: Sampler,
    steps: int | None = None,
    schedule: Schedule | str | None = None,
    prediction: str | None = None,
    variance: str | None = None,
    spacing: str | Spacing | None = None,
    eta: float | None = None,
    clip: float | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan; None stands for a default of the sampler's own.

    Raises:
        TypeError, ValueError: for options that the sampler does not take, saying which it takes.
    """
    if sampler_options is not None and not isinstance(sampler_options, Mapping):
        raise TypeError(f"sampler_options must be a mapping; got {type(sampler_options).__name__}")
    options: dict[str, Any] = {}
    named = (("prediction", prediction), ("variance", variance), ("spacing", spacing), ("eta", eta), ("clip", clip))
    for name, value in named:
        if value is not None:
            options[name] = value
    if isinstance(sampler, Plan):
        others = {"steps": steps, "schedule": schedule, "sampler_options": sampler_options}
        extra = [*options, *(name for name, value in others.items() if value is not None)]
        if extra:
            raise ValueError(f"sampler is a Plan, which fixes {', '.join(extra)}; leave them out")
        return sampler
    if sampler_options:
        options = _joined(options, sampler_options)
    if not isinstance(sampler, str):
        return _plan(sampler, steps, schedule, options)
    key: list[Any] = []
    for item in sorted(options.items()):
        key += (*item, type(item[1]))
    try:
        return _remembered(sampler, steps, str(type(steps)), schedule, *key)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _plan(sampler, steps, schedule, options)


@lru_cache(maxsize=32)
def _remembered(sampler: str, steps: Any, _: str, schedule: Any, *key: Any) -> Plan:
    # A thousand rows take as long as a hundred steps of the loop; runs that differ by seed share them. The types are
    # part of the key because 1 == True == 1.0.
    return _plan(sampler, steps, schedule, dict(zip(key[::3], key[1::3], strict=True)))


def _plan(sampler: Any, steps: int | None, schedule: Any, options: dict[str, Any]) -> Plan:
    """The plan of a sampler's name, or of its function, which may give another plan each time."""
    function, name, said = _function(sampler)
    if said is not None:
        options = {**options, "spacing": _as_said(name, said, options.get("spacing"))}
    takes, takes_all = _parameters(function)
    variance = options.get("variance")
    if isinstance(variance, str) and variance in LOGARITHMS:
        raise ValueError(f"variance is {variance!r}: {LOGARITHMS[variance]}")
    learned = isinstance(variance, str) and variance in LEARNED
    ddim_step = "eta" in takes and options.get("eta") is not None
    if learned and not takes_all and ("variance" not in takes or ddim_step):  # it has no use for one
        options = {key: value for key, value in options.items() if key != "variance"}
    options = _accepted(name, takes, takes_all, options)
    plan = function(resolve_schedule("linear" if schedule is None else schedule), steps, **options)
    if not isinstance(plan, Plan):
        raise TypeError(f"sampler={name} must return a Plan; got {type(plan).__name__}")
    return of_the_mean(plan) if learned and not plan.learned_variance else plan


LEARNED = ("learned", "learned_range")
LOGARITHMS = {
    "fixed_small_log": "its σ, exp(½ ln β̃), is that of 'fixed_small'; take that",
    "fixed_large_log": "where diffusers has it, σ is √(ln β), the root of a negative number; 'fixed_large' has σ = √β",
}


def of_the_mean(plan: Plan) -> Plan:
    """The plan for a network whose second half of channels is a variance that no row draws with: it is left unread."""
    rows = [
        replace(row, log_variance=(0.0, 0.0)) if row.calls_model and row.uses("z") else row  # exp(½·0) = 1 times σ
        for row in plan
    ]
    return replace(plan, rows=tuple(rows), learned_variance=True)


def _function(sampler: Any) -> tuple[Callable[..., Plan], str, str | None]:
    """A sampler's function, what messages call it, and the spacing that its name says."""
    if isinstance(sampler, str):
        known, spacing = understood(sampler)
        return SAMPLERS[known], repr(sampler), spacing
    if isinstance(sampler, type) or not callable(sampler):
        got = f"the class {sampler.__name__}" if isinstance(sampler, type) else type(sampler).__name__
        scheduler = hasattr(sampler, "set_timesteps")  # diffusers'
        hint = "; NoiseSchedule.from_diffusers reads a scheduler's levels, as schedule=" if scheduler else ""
        raise TypeError(f"sampler must be a name, a Plan or a function; got {got}{hint}")
    return sampler, getattr(sampler, "__name__", type(sampler).__name__), None


def _as_said(name: str, said: str, given: str | Spacing | None) -> str | Spacing:
    """The spacing that a sampler's name says, in what was given beside it."""
    spacing = Spacing.of(given)
    if spacing.name not in (None, said) or spacing.lists:
        raise ValueError(f"sampler={name} says the spacing {said!r}; got spacing={given!r} beside it")
    return replace(spacing, name=said)


def _joined(given: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    for name in more:
        if not isinstance(name, str):
            raise TypeError(f"sampler_options' names must be str; got {name!r}")
        if name in given:
            raise ValueError(f"sampler_options repeats {name}")
    return {**given, **{name: _plain(value) for name, value in more.items()}}


def _plain(value: Any) -> Any:
    """Lists and tensors as tuples: a tensor would be hashed by what it is, not by its numbers, which may change."""
    if isinstance(value, Tensor) and value.ndim == 1:
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value


def _accepted(name: str, takes: tuple[str, ...], takes_all: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The options as the sampler's function takes them: fields of a ``Spacing`` are gathered into one."""
    if takes_all or set(options).issubset(takes):
        return options
    for extra, default in (("eta", 0), ("variance", "fixed_small")):
        value = options.get(extra)
        if extra not in takes and isinstance(value, (int, float, str)) and value == default:
            options = {key: kept for key, kept in options.items() if key != extra}
    if "spacing" in takes:
        options = gathered(options, takes)
    unknown = sorted(set(options) - set(takes))
    if unknown:
        fields = f", and in spacing or beside it {', '.join(FIELDS)}" if "spacing" in takes else ""
        raise ValueError(f"sampler={name} does not take {', '.join(unknown)}; it takes {', '.join(takes)}{fields}")
    return options


def unknown_arguments(given: Mapping[str, Any], known: Sequence[str]) -> TypeError:
    """What to say of keywords that ``sample`` does not have: a sampler's option belongs in sampler_options."""
    taken = {option for function in SAMPLERS.values() for option in _parameters(function)[0]} | set(FIELDS)
    options = [f'"{name}": {value!r:.80}' for name, value in given.items() if name in taken]
    if options:
        return TypeError(f"a sampler's options are given as sampler_options={{{', '.join(options)}}}")
    name = next(iter(given))
    return TypeError(f"unexpected keyword argument {name!r}{nearest(name, known)}")


def _parameters(function: Callable[..., Plan]) -> tuple[tuple[str, ...], bool]:
    """The names of a sampler's options, and whether it takes any other (``**options``)."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a callable without a signature
        return (), True
    names = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(names[2:]), any(p.kind == p.VAR_KEYWORD for p in parameters)
