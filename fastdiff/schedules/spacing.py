"""Where a sampler stops on its way from noise to image: a list of levels, one for each network call and the last.

Index spacings choose entries of the schedule's table: leading, trailing, linspace, quadratic, ddim_quadratic, simple
(``timesteps.select``); of these trailing, linspace and simple are a flow's, too, and sd3. sgm_uniform lies evenly in t.
Sigma spacings choose σ between the schedule's σ_max and σ_min, in which the timestep is then interpolated: karras,
exponential (evenly in log-SNR; logsnr is the same), polyexponential, beta, kl_optimal. ays, ays_sdxl and ays_svd are
published lists. A ``Spacing`` may list them instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from fastdiff.checks import check_choice, check_finite_number, check_int, check_number
from fastdiff.schedules.level import Level, Schedule, check_schedule
from fastdiff.schedules.timesteps import SPACINGS, listed

SIGMA_SPACINGS = ("karras", "exponential", "logsnr", "polyexponential", "beta", "kl_optimal")
# Sabour, Fidler & Kreis 2024, "Align Your Steps", as NVIDIA published them: ten steps and the σ_min after them.
ALIGNED = {
    "ays": (14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904,
            0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    "ays_sdxl": (14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289,
                 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip
INDEX_SPACINGS = (*SPACINGS, "sgm_uniform", "sd3")
NAMES = (*INDEX_SPACINGS, *SIGMA_SPACINGS, *ALIGNED)
# Those whose last point is the process's least σ, or stands for it.
REACHING = ("linspace", "quadratic", "ddim_quadratic", "sd3", *SIGMA_SPACINGS, *ALIGNED)
FINALS = ("zero", "sigma_min")
ROUNDING = 4 * 2.0**-23  # of σ in float32, relative


@dataclass(frozen=True)
class Spacing:
    """Which levels a sampler stops at. Every sampler takes one as ``spacing=``; a name alone is short for it.

    Args:
        name: "leading", "trailing", "linspace", "quadratic", "ddim_quadratic" (DDIM's own list), "simple",
            "sgm_uniform" (both ComfyUI's), "sd3" (flows), "karras", "exponential", "logsnr", "polyexponential", "beta",
            "kl_optimal", or "ays" (Align Your Steps, for Stable Diffusion 1.5), "ays_sdxl", "ays_svd"; None is the
            sampler's own or else the schedule's: trailing, or karras for EDM. Lists take its place.
        timesteps: what the network is told, falling, one for each call. Between two indices σ is interpolated. −1 at
            the end of a table's list, where diffusers' lists may have it, names the image and makes no call.
        sigmas: σ/α (a flow's σ) of each level, falling, one for each call and the last, which may be 0. A σ above the
            one before it by no more than float32's rounding is equal to it, a step of no length. With both lists, each
            call is told the timestep at the σ that stand in the lists.
        steps_offset: added to the timesteps of "leading" (Stable Diffusion has 1).
        rho: the exponent of karras (7) and polyexponential (1).
        quantize: round the timesteps to whole numbers, for a network that takes those alone; σ stays as it is. Of
            levels that are rounded to one timestep the first stays, so that there may be fewer than ``steps``.
        final: the level after the last call: "zero", or "sigma_min", the schedule's least σ; None is the sampler's own,
            which is "zero" but for ``tcd``. Spacings that reach σ_min by themselves (all but leading and trailing) then
            make their last call before it. With ``sigmas`` their last entry says it.
        skip: leave out this many levels at the start, as image-to-image does.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    name: str | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    steps_offset: int = 0
    rho: float | None = None
    quantize: bool = False
    final: str | None = None
    skip: int = 0

    def __post_init__(self) -> None:
        if self.name is not None:
            check_choice("spacing", self.name, NAMES)
        for name in ("timesteps", "sigmas"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(listed(name, getattr(self, name))))
        check_int("steps_offset", self.steps_offset, -(1 << 63), 1 << 63)  # how far it goes depends on the schedule
        if self.rho is not None:
            check_finite_number("rho", self.rho)
        if not isinstance(self.quantize, bool):
            raise TypeError(f"quantize must be a bool; got {type(self.quantize).__name__}")
        if self.final is not None:
            check_choice("final", self.final, FINALS)
        if self.sigmas is not None and self.final not in (None, "zero"):
            raise ValueError(f"final={self.final!r} goes without sigmas, whose last entry is the last level")
        check_int("skip", self.skip, 0, 1 << 24)

    @classmethod
    def of(cls, spacing: str | Spacing | None) -> Spacing:
        """A sampler's ``spacing``: a name or None is short for a Spacing of that name."""
        return spacing if isinstance(spacing, Spacing) else cls(spacing)

    @property
    def lists(self) -> bool:
        """Whether the levels are listed, rather than spaced by a name."""
        return self.timesteps is not None or self.sigmas is not None


FIELDS = tuple(field.name for field in fields(Spacing) if field.name != "name")


def gathered(options: Mapping[str, Any], own: Mapping[str, Any] | Any = ()) -> dict[str, Any]:
    """Options in which those named like a field of ``Spacing`` stand in one ``spacing``; not those in ``own``.

    Raises ValueError where a Spacing has one of them already.
    """
    given = {name: value for name, value in options.items() if name in FIELDS and name not in own and value is not None}
    if not given:
        return dict(options)
    spacing = Spacing.of(options.get("spacing"))
    for name in given:
        if getattr(spacing, name) != getattr(Spacing(), name):
            raise ValueError(f"{name} is given twice: in spacing and beside it")
    rest = {name: value for name, value in options.items() if name not in FIELDS or name in own}
    return {**rest, "spacing": replace(spacing, **given)}


def levels(
    schedule: Schedule, steps: int | None = None, spacing: str | Spacing | None = None, default: str | None = None
) -> list[Level]:
    """The levels that ``steps`` network calls of a first-order sampler stop at, falling in σ: steps + 1 of them.

    Args:
        schedule: a NoiseSchedule, EDMSchedule or FlowSchedule, or another ``Schedule``.
        steps: network calls; None visits all T of a NoiseSchedule.
        spacing: a ``Spacing`` or its name.
        default: the name that stands for none where the schedule has a table; else the schedule's own.

    Raises:
        TypeError, ValueError: naming the argument; also where two levels coincide.
    """
    check_schedule(schedule)
    spacing = Spacing.of(spacing)
    name = spacing.name or (default if schedule.table_length is not None else None) or schedule.default_spacing
    final = spacing.final or "zero"
    if spacing.steps_offset and (spacing.lists or name != "leading" or schedule.table_length is None):
        raise ValueError(
            f"steps_offset goes with a NoiseSchedule's spacing='leading' alone; got {spacing.steps_offset}"
        )
    if spacing.rho is not None and (spacing.lists or name not in ("karras", "polyexponential")):
        raise ValueError(f"rho goes with spacing='karras' or 'polyexponential' alone; got {spacing.rho}")
    if spacing.quantize and not schedule.whole_timesteps:
        raise ValueError("quantize is for whole timesteps; an EDMSchedule's are ¼ ln σ")

    if spacing.sigmas is not None:
        chosen = [schedule.at(sigma) for sigma in _falling_to(spacing.sigmas, steps)]
    else:
        if spacing.timesteps is not None:
            chosen = _listed_levels(schedule, steps, spacing.timesteps)
            reaches = False
        else:
            # One more point where the spacing itself ends at σ_min.
            reaches = final == "sigma_min" and name in REACHING
            chosen = _spaced(schedule, steps, name, spacing, int(reaches))
        if not reaches:
            chosen.append(schedule.at(0.0) if final == "zero" else schedule.least())
    if spacing.sigmas is not None and spacing.timesteps is not None:
        times = _indices(schedule, listed("timesteps", spacing.timesteps, len(chosen) - 1))
        chosen = [replace(level, t=t) for level, t in zip(chosen, times, strict=False)] + chosen[-1:]
    if spacing.quantize:
        whole = int if schedule.table_length is not None else float
        *called, end = (replace(level, t=whole(round(level.t))) for level in chosen)
        merged: dict[float, Level] = {}
        for level in called:
            merged.setdefault(level.t, level)
        chosen = [*merged.values(), end]
    return _checked(chosen)[check_int("skip", spacing.skip, 0, len(chosen) - 2) :]


def _checked(chosen: list[Level]) -> list[Level]:
    for i, (a, b) in enumerate(pairwise(chosen)):
        if not a.ratio > b.ratio:
            twice = "; a list that ends with its last σ twice makes a call that moves nothing: end it with 0"
            raise ValueError(
                f"σ must fall from each level to the next; level {i} has {a.ratio:g} and level {i + 1} {b.ratio:g}"
                + (twice if a.ratio == b.ratio > 0 and i + 2 == len(chosen) > 2 else "")
            )
        if i + 2 < len(chosen) and a.t == b.t:
            raise ValueError(f"levels {i} and {i + 1} have the same timestep {a.t:g}: take fewer steps")
        if i + 2 < len(chosen) and a.t < b.t:
            raise ValueError(f"timesteps must fall with σ; level {i} has {a.t:g} and level {i + 1} {b.t:g}")
    return chosen


def _falling_to(sigmas: Sequence[float], steps: int | None) -> Sequence[float]:
    if len(sigmas) < 2:
        raise ValueError(f"sigmas must hold the σ of each call and the last one, two or more; got {len(sigmas)}")
    if steps is not None and check_int("steps", steps, 1, 1 << 20) != len(sigmas) - 1:
        raise ValueError(f"steps is {steps}, but sigmas has {len(sigmas)} entries, for {len(sigmas) - 1} steps")
    if min(sigmas) < 0:
        raise ValueError(f"sigmas must not be negative; got {min(sigmas)}")
    falling = list(sigmas)
    for i, (a, b) in enumerate(pairwise(sigmas)):
        if a < b <= a * (1 + ROUNDING):
            falling[i + 1] = falling[i] * (1 - 1e-12)
    return falling


def _indices(schedule: Schedule, times: list[float]) -> list[float]:
    """Timesteps of a list as ints where all of them are indices of a table: its network is told int64."""
    if schedule.table_length is not None and all(t.is_integer() for t in times):
        return [int(t) for t in times]
    return times


def _listed_levels(schedule: Schedule, steps: int | None, timesteps: Sequence[float]) -> list[Level]:
    chosen = []
    if schedule.table_length is not None:
        last = max((i + 1 for i, t in enumerate(timesteps) if t != -1), default=len(timesteps))
        steps = last if steps == len(timesteps) else steps
        timesteps = timesteps[:last]
    for i, t in enumerate(_indices(schedule, listed("timesteps", timesteps, steps))):
        try:
            chosen.append(schedule.level(t))
        except ValueError as error:
            raise ValueError(f"timesteps[{i}]: {error}") from None
    if schedule.table_length is not None and any(a <= b for a, b in pairwise(timesteps)):
        raise ValueError("timesteps must fall strictly")
    return chosen


def _spaced(schedule: Schedule, steps: int | None, name: str, spacing: Spacing, more: int) -> list[Level]:
    """The levels of ``steps + more`` points."""
    if steps is None and schedule.table_length is None:
        raise ValueError(f"steps must be given: {type(schedule).__name__} has no table to visit")
    most = 1 << 20 if schedule.table_length is None else schedule.table_length - more
    count = (most if steps is None else check_int("steps", steps, 1, most)) + more
    if name in INDEX_SPACINGS:
        return schedule.indexed(name, count, spacing.steps_offset)
    if name in ALIGNED:
        aligned = _aligned(name, schedule, count + 1 - more)
        return [schedule.at(sigma) for sigma in aligned[:count]]
    high, low = schedule.sigma_max, schedule.sigma_min
    if not math.isfinite(high) or low == 0:
        raise ValueError(f"spacing {name!r} needs a finite σ_max and a positive σ_min; the schedule has {high}, {low}")
    return [schedule.at(sigma) for sigma in _sigmas(name, high, low, count, spacing.rho)]


def _aligned(name: str, schedule: Schedule, count: int) -> list[float]:
    """The published list, or ``count`` σ of it with ln σ interpolated, as NVIDIA's page does."""
    published = ALIGNED[name]
    if not math.isclose(schedule.sigma_max, published[0], rel_tol=1e-3):
        raise ValueError(
            f"spacing {name!r} was published for a σ_max of {published[0]:g}; the schedule's is {schedule.sigma_max:g}"
        )
    if count == len(published):
        return list(published)
    places = [i * (len(published) - 1) / (count - 1) for i in range(count - 1)]
    logs = [math.log(sigma) for sigma in published]
    found = [math.exp(logs[int(p)] + (p - int(p)) * (logs[int(p) + 1] - logs[int(p)])) for p in places]
    return [published[0], *found[1:], published[-1]]


def _sigmas(spacing: str, high: float, low: float, count: int, rho: float | None) -> list[float]:
    """``count`` σ from high to low, both exactly."""
    shares = [i / (count - 1) for i in range(1, count - 1)]
    if spacing == "karras":  # Karras et al. 2022, Equation 5
        power = check_number("rho", 7.0 if rho is None else rho, 1e-3, 1e3)
        try:
            a, b = high ** (1 / power), low ** (1 / power)
            between = [(a + u * (b - a)) ** power for u in shares]
        except OverflowError:
            raise ValueError(f"rho is {rho}: σ_max^(1/rho) is beyond float64, σ_max being {high:g}") from None
    elif spacing == "kl_optimal":  # Sabour et al. 2024, for data of unit variance: even in arctan σ
        between = [math.tan(u * math.atan(low) + (1 - u) * math.atan(high)) for u in shares]
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
