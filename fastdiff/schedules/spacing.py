"""Where a sampler stops on its way from noise to image: a list of levels, one for each network call and the last.

Index spacings choose entries of the schedule's table: leading, trailing, linspace, quadratic (``timesteps.select``).
Sigma spacings choose σ between the schedule's σ_max and σ_min, in which the timestep is then interpolated: karras,
exponential (evenly in log-SNR; logsnr is the same), polyexponential, beta. ``timesteps`` and ``sigmas`` list them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from fastdiff.checks import check_int, check_number, nearest
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule
from fastdiff.schedules.discrete import NAMED, NoiseSchedule, resolve_schedule
from fastdiff.schedules.level import Level
from fastdiff.schedules.timesteps import SPACINGS, listed, select

__all__ = ["Schedule", "clean", "levels", "nearest", "resolve_any_schedule"]

Schedule = NoiseSchedule | EDMSchedule | FlowSchedule
SIGMA_SPACINGS = ("karras", "exponential", "logsnr", "polyexponential", "beta")
REACHING = ("linspace", "quadratic", *SIGMA_SPACINGS)  # those whose last point is σ_min
FINALS = ("zero", "sigma_min")
CONTINUOUS: dict[str, Schedule] = {"edm": EDMSchedule(), "flow": FlowSchedule()}


def levels(
    schedule: Schedule,
    steps: int | None = None,
    *,
    ve: bool = False,
    spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    steps_offset: int = 0,
    rho: float | None = None,
    quantize: bool = False,
    final: str = "zero",
    skip: int = 0,
) -> list[Level]:
    """The levels that a walk of ``steps`` network calls stops at, falling in σ: steps + 1 of them.

    Args:
        schedule: a NoiseSchedule, EDMSchedule or FlowSchedule.
        steps: network calls of a first-order sampler; None visits all T of a NoiseSchedule.
        ve: states of a NoiseSchedule as x_0 + σ ε (k-diffusion's) rather than √ᾱ x_0 + √(1−ᾱ) ε.
        spacing: a name of the module's; None is the schedule's own: trailing, or karras for EDM. Lists take its place.
        timesteps: what the network is told, falling, one for each call. Between two indices σ is interpolated.
        sigmas: σ/α (a flow's σ) of each level, falling, one for each call and the last, which may be 0. With both,
            each call is told the timestep at the σ that stand in the lists.
        steps_offset: added to the timesteps of "leading" (Stable Diffusion has 1).
        rho: the exponent of karras (7) and polyexponential (1).
        quantize: round the timesteps to whole numbers, for a network that takes those alone; σ stays as it is.
        final: the level after the last call: "zero", or "sigma_min", the schedule's least σ. Spacings that reach
            σ_min by themselves (all but leading and trailing) then make their last call before it. With ``sigmas``
            their last entry says it.
        skip: leave out this many levels at the start, as image-to-image does.

    Raises:
        TypeError, ValueError: naming the argument; also where two levels coincide.
    """
    if not isinstance(schedule, (NoiseSchedule, EDMSchedule, FlowSchedule)):
        raise TypeError(f"schedule must be a NoiseSchedule, EDMSchedule or FlowSchedule; got {type(schedule).__name__}")
    known = (*SPACINGS, *SIGMA_SPACINGS)
    spacing = schedule.default_spacing if spacing is None else spacing
    if not isinstance(spacing, str) or spacing not in known:
        raise ValueError(f"spacing is {spacing!r}" + nearest(spacing, known))
    if final not in FINALS:
        raise ValueError(f"final is {final!r}" + nearest(final, FINALS))
    lists = timesteps is not None or sigmas is not None
    if steps_offset and (lists or spacing != "leading" or not isinstance(schedule, NoiseSchedule)):
        raise ValueError(f"steps_offset goes with a NoiseSchedule's spacing='leading' alone; got {steps_offset}")
    if rho is not None and (lists or spacing not in ("karras", "polyexponential")):
        raise ValueError(f"rho goes with spacing='karras' or 'polyexponential' alone; got {rho}")
    if quantize and isinstance(schedule, EDMSchedule):
        raise ValueError("quantize is for whole timesteps; an EDMSchedule's are ¼ ln σ")
    if sigmas is not None and final != "zero":
        raise ValueError(f"final={final!r} goes without sigmas, whose last entry is the last level")

    if sigmas is not None:
        chosen = [schedule.at(sigma, ve=ve) for sigma in _falling_to(sigmas, steps)]
    elif timesteps is not None:
        chosen = _told_levels(schedule, steps, spacing, timesteps, ve)
    else:
        # One more point where the spacing itself ends at σ_min.
        reaches = final == "sigma_min" and spacing in REACHING
        chosen = _spaced(schedule, steps, spacing, steps_offset, rho, ve, int(reaches))
    if sigmas is None and (final == "zero" or timesteps is not None or spacing not in REACHING):
        chosen.append(clean(schedule, ve) if final == "zero" else _least(schedule, ve))
    if sigmas is not None and timesteps is not None:
        told = listed("timesteps", timesteps, len(chosen) - 1)
        chosen = [replace(level, t=t) for level, t in zip(chosen, told, strict=False)] + chosen[-1:]
    if quantize:
        chosen = [replace(level, t=float(round(level.t))) for level in chosen]
    return _checked(chosen)[check_int("skip", skip, 0, len(chosen) - 2) :]


def resolve_any_schedule(schedule: Schedule | str) -> Schedule:
    """A schedule as it is, or a named one with its default numbers: those of NoiseSchedule, "edm" and "flow"."""
    if isinstance(schedule, (EDMSchedule, FlowSchedule)):
        return schedule
    if isinstance(schedule, str) and schedule in CONTINUOUS:
        return CONTINUOUS[schedule]
    if isinstance(schedule, str) and schedule not in NAMED:
        raise ValueError(f"schedule is {schedule!r}" + nearest(schedule, (*NAMED, *CONTINUOUS)))
    return resolve_schedule(schedule)


def clean(schedule: Schedule, ve: bool) -> Level:
    """The level without noise."""
    return schedule.at(0.0, ve=ve)


def _least(schedule: Schedule, ve: bool) -> Level:
    return schedule.level(0, ve=ve) if isinstance(schedule, NoiseSchedule) else schedule.at(schedule.sigma_min, ve=ve)


def _checked(chosen: list[Level]) -> list[Level]:
    for i, (a, b) in enumerate(pairwise(chosen)):
        if not a.ratio > b.ratio:
            raise ValueError(
                f"σ must fall from each level to the next; level {i} has {a.ratio:g} and level {i + 1} {b.ratio:g}"
            )
        if i + 2 < len(chosen) and a.t == b.t:
            raise ValueError(f"levels {i} and {i + 1} have the same timestep {a.t:g}: take fewer steps")
        if i + 2 < len(chosen) and a.t < b.t:
            raise ValueError(f"timesteps must fall with σ; level {i} has {a.t:g} and level {i + 1} {b.t:g}")
    if not math.isfinite(chosen[0].ratio) and chosen[0].c_in != 1:
        raise ValueError("the schedule's last ᾱ is 0, where this sampler's σ is infinite; take another sampler")
    return chosen


def _falling_to(sigmas: Sequence[float], steps: int | None) -> list[float]:
    values = listed("sigmas", sigmas)
    if len(values) < 2:
        raise ValueError(f"sigmas must hold the σ of each call and the last one, two or more; got {len(values)}")
    if steps is not None and check_int("steps", steps, 1, 1 << 20) != len(values) - 1:
        raise ValueError(f"steps is {steps}, but sigmas has {len(values)} entries, for {len(values) - 1} steps")
    if min(values) < 0:
        raise ValueError(f"sigmas must not be negative; got {min(values)}")
    return values


def _told_levels(
    schedule: Schedule, steps: int | None, spacing: str, timesteps: Sequence[float], ve: bool
) -> list[Level]:
    if isinstance(schedule, NoiseSchedule):
        chosen = select(schedule, steps, spacing if spacing in SPACINGS else "trailing", timesteps)
        return [schedule.level(t, ve=ve) for t in chosen]
    return [schedule.at(schedule.sigma_at(t), ve=ve) for t in listed("timesteps", timesteps, steps)]


def _spaced(
    schedule: Schedule, steps: int | None, spacing: str, steps_offset: int, rho: float | None, ve: bool, more: int
) -> list[Level]:
    """The levels of ``steps + more`` points."""
    table = isinstance(schedule, NoiseSchedule)
    if steps is None and not table:
        raise ValueError(f"steps must be given: a {type(schedule).__name__} has no table to visit")
    most = len(schedule) - more if isinstance(schedule, NoiseSchedule) else 1 << 20
    count = (most if steps is None else check_int("steps", steps, 1, most)) + more
    if isinstance(schedule, NoiseSchedule) and spacing in SPACINGS:
        return [schedule.level(t, ve=ve) for t in select(schedule, count, spacing, None, steps_offset)]
    if isinstance(schedule, FlowSchedule) and spacing in SPACINGS:
        return [schedule.at(schedule.shifted(u), ve=ve) for u in _flow(schedule, spacing, count)]
    if spacing in SPACINGS:
        raise ValueError(f"spacing {spacing!r} needs a schedule with a table; take one of {', '.join(SIGMA_SPACINGS)}")
    high, low = schedule.sigma_max, schedule.sigma_min
    if not math.isfinite(high) or low == 0:
        raise ValueError(
            f"spacing {spacing!r} needs a finite σ_max and a positive σ_min; the schedule has {high}, {low}"
        )
    return [schedule.at(sigma, ve=ve) for sigma in _sigmas(spacing, high, low, count, rho)]


def _sigmas(spacing: str, high: float, low: float, count: int, rho: float | None) -> list[float]:
    """``count`` σ from high to low, both exactly."""
    shares = [i / (count - 1) for i in range(1, count - 1)]
    if spacing == "karras":  # Karras et al. 2022, Equation 5
        power = check_number("rho", 7.0 if rho is None else rho, 1e-3, 1e3)
        a, b = high ** (1 / power), low ** (1 / power)
        between = [(a + u * (b - a)) ** power for u in shares]
    elif spacing == "beta":  # Lee et al. 2024, "Beta Sampling is All You Need", with its α = β = 0.6
        try:
            from scipy.stats import beta
        except ImportError as error:
            raise ImportError("spacing='beta' needs scipy: pip install scipy") from error
        between = [low + float(beta.ppf(1 - u, 0.6, 0.6)) * (high - low) for u in shares]
    else:
        power = check_number("rho", 1.0 if rho is None else rho, 1e-3, 1e3)
        between = [math.exp(math.log(low) + (1 - u) ** power * math.log(high / low)) for u in shares]
    return [high, *between, low][:count]


def _flow(schedule: FlowSchedule, spacing: str, count: int) -> list[float]:
    if spacing == "trailing":
        return [1 - i / count for i in range(count)]
    if spacing == "linspace":
        least = 1 / schedule.T
        return [1 + (least - 1) * i / (count - 1) if count > 1 else 1.0 for i in range(count)]
    raise ValueError(f"spacing {spacing!r} needs a NoiseSchedule; a flow takes trailing, linspace or a sigma spacing")
