"""Where a sampler stops on its way from noise to image: a list of levels, one for each network call and the last.

Index spacings choose entries of the schedule's table: leading, trailing, linspace, quadratic (``timesteps.select``).
Sigma spacings choose σ between the schedule's σ_max and σ_min, in which the timestep is then interpolated: karras,
exponential (evenly in log-SNR; logsnr is the same), polyexponential, beta. ``timesteps`` and ``sigmas`` list them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fastdiff.continuous import EDMSchedule, FlowSchedule
from fastdiff.levels import Level
from fastdiff.noise import check_int
from fastdiff.samplers.timesteps import SPACINGS, select
from fastdiff.schedule import NoiseSchedule, resolve_schedule

Schedule = NoiseSchedule | EDMSchedule | FlowSchedule
SIGMA_SPACINGS = ("karras", "exponential", "logsnr", "polyexponential", "beta")
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
        spacing: a name of the module's; None is the schedule's own: trailing, or karras for EDM.
        timesteps: what the network is told, falling, one for each call. Between two indices σ is interpolated.
        sigmas: σ/α (a flow's σ) of each level, falling, one for each call and the last, which may be 0. With both,
            each call is told the timestep at the σ that stand in the lists.
        steps_offset: added to the timesteps of "leading" (Stable Diffusion has 1).
        rho: the exponent of karras (7) and polyexponential (1).
        quantize: round the timesteps that sigma spacings interpolate, for a network that takes integers alone.
        final: "zero", or "sigma_min", the schedule's least σ, where ``sigmas`` does not say.
        skip: leave out this many levels at the start, as image-to-image does.

    Raises:
        TypeError, ValueError: naming the argument; also where two levels coincide.
    """
    if not isinstance(schedule, (NoiseSchedule, EDMSchedule, FlowSchedule)):
        raise TypeError(f"schedule must be a NoiseSchedule, EDMSchedule or FlowSchedule; got {type(schedule).__name__}")
    if final not in FINALS:
        raise ValueError(f"final is {final!r}; it must be one of {', '.join(FINALS)}")
    if sigmas is not None:
        chosen = _listed(schedule, steps, timesteps, _numbers("sigmas", sigmas), ve, quantize)
    else:
        chosen = _spaced(schedule, steps, ve, spacing, timesteps, steps_offset, rho, quantize)
        chosen.append(_least(schedule, ve) if final == "sigma_min" else clean(schedule, ve))
    for i, (a, b) in enumerate(pairwise(chosen)):
        if not a.ratio > b.ratio:
            raise ValueError(
                f"σ must fall from each level to the next; level {i} has {a.ratio:g} and level {i + 1} {b.ratio:g}"
            )
        if a.t == b.t and i + 2 < len(chosen):
            raise ValueError(f"levels {i} and {i + 1} have the same timestep {a.t:g}: take fewer steps")
    if not math.isfinite(chosen[0].ratio) and chosen[0].c_in != 1:
        raise ValueError("the schedule's last ᾱ is 0, where this sampler's σ is infinite; take another sampler")
    return chosen[check_int("skip", skip, 0, len(chosen) - 2) :]


def resolve_any_schedule(schedule: Schedule | str) -> Schedule:
    """A schedule as it is, or a named one with its default numbers: those of NoiseSchedule, "edm" and "flow"."""
    if isinstance(schedule, (EDMSchedule, FlowSchedule)):
        return schedule
    if isinstance(schedule, str) and schedule in CONTINUOUS:
        return CONTINUOUS[schedule]
    return resolve_schedule(schedule)


def clean(schedule: Schedule, ve: bool) -> Level:
    """The level without noise."""
    return schedule.at(0.0, ve=ve)


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for an unknown name."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it must be one of {', '.join(known)}"


def _least(schedule: Schedule, ve: bool) -> Level:
    return schedule.level(0, ve=ve) if isinstance(schedule, NoiseSchedule) else schedule.at(schedule.sigma_min, ve=ve)


def _listed(
    schedule: Schedule,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: list[float],
    ve: bool,
    quantize: bool,
) -> list[Level]:
    if len(sigmas) < 2:
        raise ValueError(f"sigmas must hold the σ of each call and the last one, two or more; got {len(sigmas)}")
    if steps is not None and steps != len(sigmas) - 1:
        raise ValueError(f"steps is {steps}, but sigmas has {len(sigmas)} entries, for {len(sigmas) - 1} steps")
    if min(sigmas) < 0:
        raise ValueError(f"sigmas must not be negative; got {min(sigmas)}")
    chosen = [_quantized(schedule.at(sigma, ve=ve), quantize) for sigma in sigmas]
    if timesteps is None:
        return chosen
    told = _numbers("timesteps", timesteps)
    if len(told) != len(sigmas) - 1:
        raise ValueError(f"timesteps must have one entry a step, {len(sigmas) - 1}; got {len(told)}")
    return [_told(level, t) for level, t in zip(chosen, told, strict=False)] + chosen[-1:]


def _spaced(
    schedule: Schedule,
    steps: int | None,
    ve: bool,
    spacing: str | None,
    timesteps: Sequence[float] | None,
    steps_offset: int,
    rho: float | None,
    quantize: bool,
) -> list[Level]:
    known = (*SPACINGS, *SIGMA_SPACINGS)
    spacing = schedule.default_spacing if spacing is None else spacing
    if not isinstance(spacing, str) or spacing not in known:
        raise ValueError(f"spacing is {spacing!r}" + nearest(str(spacing), known))
    if timesteps is not None and not isinstance(schedule, NoiseSchedule):
        told = _numbers("timesteps", timesteps)
        return [schedule.at(schedule.sigma_at(t), ve=ve) for t in told]
    if isinstance(schedule, NoiseSchedule) and (timesteps is not None or spacing in SPACINGS):
        return [schedule.level(t, ve=ve) for t in select(schedule, steps, spacing, timesteps, steps_offset)]
    count = check_int("steps", steps, 1, len(schedule) if isinstance(schedule, NoiseSchedule) else 1 << 20)
    if isinstance(schedule, FlowSchedule) and spacing in SPACINGS:
        return [schedule.at(schedule.shifted(u), ve=ve) for u in _flow(schedule, spacing, count)]
    if spacing in SPACINGS:
        raise ValueError(f"spacing {spacing!r} needs a schedule with a table; take one of {', '.join(SIGMA_SPACINGS)}")
    high, low = schedule.sigma_max, schedule.sigma_min
    if not math.isfinite(high):
        raise ValueError(f"spacing {spacing!r} needs a finite σ_max, but the schedule's last ᾱ is 0")
    between = [i / (count - 1) if count > 1 else 0.0 for i in range(count)]
    return [_quantized(schedule.at(s, ve=ve), quantize) for s in _sigmas(spacing, high, low, between, rho)]


def _sigmas(spacing: str, high: float, low: float, between: list[float], rho: float | None) -> list[float]:
    """σ from high to low, at shares 0 … 1 of the way."""
    if spacing == "karras":  # Karras et al. 2022, Equation 5
        rho = 7.0 if rho is None else rho
        return [(high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho for u in between]
    if spacing == "beta":  # Lee et al. 2024, "Beta Sampling is All You Need", with its α = β = 0.6
        try:
            from scipy.stats import beta
        except ImportError as error:
            raise ImportError("spacing='beta' needs scipy: pip install scipy") from error
        return [low + float(beta.ppf(1 - u, 0.6, 0.6)) * (high - low) for u in between]
    rho = 1.0 if rho is None or spacing != "polyexponential" else rho
    return [math.exp(math.log(low) + (1 - u) ** rho * (math.log(high) - math.log(low))) for u in between]


def _flow(schedule: FlowSchedule, spacing: str, count: int) -> list[float]:
    if spacing == "trailing":
        return [1 - i / count for i in range(count)]
    if spacing == "linspace":
        least = 1 / schedule.T
        return [1 + (least - 1) * i / (count - 1) if count > 1 else 1.0 for i in range(count)]
    raise ValueError(f"spacing {spacing!r} needs a NoiseSchedule; a flow takes trailing or linspace")


def _quantized(level: Level, quantize: bool) -> Level:
    return _told(level, float(round(level.t))) if quantize else level


def _told(level: Level, t: float) -> Level:
    return Level(t, level.alpha, level.sigma, level.c_in, level.sigma_data)


def _numbers(name: str, values: Any) -> list[float]:
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise TypeError(f"{name} must be a sequence of numbers; got {type(values).__name__}")
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a sequence of numbers: {error}") from None
    if not numbers or not all(math.isfinite(value) for value in numbers):
        raise ValueError(f"{name} must hold finite numbers, at least one; got {numbers}")
    return numbers
