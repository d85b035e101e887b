"""Noise schedules: ᾱ_t in float64, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdiff.checks import check_finite_number, check_int, check_number
from fastdiff.schedules.diffusers_config import class_of, kind, read, terminal_floor, with_defaults
from fastdiff.schedules.level import Level, Schedule
from fastdiff.schedules.timesteps import select


@dataclass(frozen=True, eq=False)
class NoiseSchedule(Schedule):
    """The cumulative products ᾱ_t = Π_{i≤t} (1 − β_i) of a discrete diffusion process, index 0 being the least noisy.

    ``alphas_cumprod`` is a float64 CPU tensor [T] with 0 ≤ ᾱ ≤ 1 that never increases; treat it as immutable.
    Ho, Jain & Abbeel (2020), Equation 4. Build one with a classmethod rather than from the constructor.
    """

    alphas_cumprod: torch.Tensor

    def __post_init__(self) -> None:
        values = _vector("alphas_cumprod", self.alphas_cumprod)
        if bool((values < 0).any()) or bool((values > 1).any()):
            raise ValueError(f"alphas_cumprod must lie in [0, 1]; got {values.min().item()} … {values.max().item()}")
        if bool((values[1:] > values[:-1]).any()):
            index = int((values[1:] > values[:-1]).nonzero()[0]) + 1
            raise ValueError(f"alphas_cumprod must not increase; it does at index {index}")
        object.__setattr__(self, "alphas_cumprod", values)

    # ---- properties

    def __len__(self) -> int:
        return self.alphas_cumprod.numel()

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, NoiseSchedule) and torch.equal(self.alphas_cumprod, other.alphas_cumprod)

    def __hash__(self) -> int:
        # Of the numbers as they are now: plans are kept by it, and a table edited in place must not find an old one.
        return hash(self.alphas_cumprod.numpy().tobytes())

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[0].item(), self.alphas_cumprod[-1].item()
        return f"NoiseSchedule(T={len(self)}, alphas_cumprod={first:.8g} … {last:.8g})"

    @property
    def betas(self) -> torch.Tensor:
        """β_t = 1 − ᾱ_t/ᾱ_{t−1}, float64 [T]; 1 where ᾱ_t is 0."""
        previous = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), self.alphas_cumprod[:-1]])
        return 1 - torch.where(previous > 0, self.alphas_cumprod / previous, torch.zeros_like(previous))

    @property
    def alphas(self) -> torch.Tensor:
        """√ᾱ_t, the signal's factor in x_t = α_t x_0 + σ_t ε, float64 [T]."""
        return _sqrt(self.alphas_cumprod)

    @property
    def sigmas(self) -> torch.Tensor:
        """√(1 − ᾱ_t), the noise's factor in x_t = α_t x_0 + σ_t ε, float64 [T]."""
        return _sqrt(1 - self.alphas_cumprod)

    # ---- levels: the schedule as samplers see it

    default_spacing = "trailing"

    @property
    def table_length(self) -> int:
        """T."""
        return len(self)

    @property
    def sigma_min(self) -> float:
        """√((1 − ᾱ)/ᾱ) at index 0."""
        return self.sigma_at(0)

    @property
    def sigma_max(self) -> float:
        """√((1 − ᾱ)/ᾱ) at index T − 1, infinite where ᾱ is 0."""
        return self.sigma_at(len(self) - 1)

    def level(self, t: float) -> Level:
        """The level at an index; between two, σ/α is interpolated linearly. ValueError for t outside [0, T − 1].

        An int stays one, so that the network is told int64; a float is told as float32, whole or not.
        """
        self._check_time(t)
        if float(t).is_integer():
            bar = float(self.alphas_cumprod[int(t)])
            return Level(t, math.sqrt(bar), math.sqrt(1 - bar))
        return _vp_level(t, self.sigma_at(t))

    def at(self, sigma: float) -> Level:
        """The level where σ/α is ``sigma``; its timestep is interpolated linearly in ln σ (Karras et al. 2022)."""
        return _vp_level(self.time_at(sigma), sigma)

    def least(self) -> Level:
        """The level at index 0."""
        return self.level(0)

    def indexed(self, spacing: str, count: int, steps_offset: int = 0) -> list[Level]:
        """The levels at the indices that ``timesteps.select`` chooses; sgm_uniform lies between indices."""
        return _indexed(self, self, spacing, count, steps_offset)

    def as_ve(self) -> VESchedule:
        """The same process with its states written as x_0 + σ ε, σ = √((1 − ᾱ)/ᾱ), as k-diffusion has them."""
        return VESchedule(self)

    def sigma_at(self, t: float) -> float:
        """σ/α = √((1 − ᾱ)/ᾱ) at an index t of [0, T − 1], or linearly between two; infinite where ᾱ is 0."""
        self._check_time(t)
        low = int(t)
        a, b = (self._ratio(i) for i in (low, min(low + 1, len(self) - 1)))
        return a if t == low else a + (t - low) * (b - a)

    def log_sigma_at(self, t: float) -> float:
        """σ/α at t, between two indices linearly in ln σ: the inverse of ``time_at``."""
        self._check_time(t)
        low = int(t)
        a, b = (self._ratio(i) for i in (low, min(low + 1, len(self) - 1)))
        return a if t == low or a == 0 else a * (b / a) ** (t - low)

    def time_at(self, sigma: float) -> float:
        """The index whose σ/α is ``sigma`` ≥ 0, linearly in ln σ between two, 0 or T − 1 beyond the ends."""
        if not check_number("sigma", sigma, -math.inf, math.inf) >= 0:
            raise ValueError(f"sigma must not be negative; got {sigma}")
        bar = 1 / (1 + sigma**2)
        falling = self.alphas_cumprod
        above = int(
            torch.searchsorted(-falling, torch.tensor(-bar, dtype=torch.float64, device="cpu"))
        )  # first with ᾱ <= bar
        if above == 0 or above == len(self):
            return float(max(above - 1, 0))
        a, b = self._ratio(above - 1), self._ratio(above)
        if a == 0 or not math.isfinite(b):
            return float(above if sigma >= b else above - 1)
        return above - 1 + (math.log(sigma) - math.log(a)) / (math.log(b) - math.log(a))

    def _check_time(self, t: float) -> None:
        check_number("t", t, 0, len(self) - 1)

    def _ratio(self, index: int) -> float:
        bar = float(self.alphas_cumprod[index])
        return math.sqrt((1 - bar) / bar) if bar else math.inf

    # ---- constructors

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Any) -> NoiseSchedule:
        """A schedule with the given ᾱ: a sequence, array or tensor [T] of numbers in [0, 1] that never increases."""
        return cls(alphas_cumprod)

    @classmethod
    def from_betas(cls, betas: Any) -> NoiseSchedule:
        """A schedule with the given β: a sequence, array or tensor [T] of numbers in [0, 1]."""
        values = _vector("betas", betas)
        if bool((values < 0).any()) or bool((values > 1).any()):
            raise ValueError(f"betas must lie in [0, 1]; got {values.min().item()} … {values.max().item()}")
        return cls(torch.cumprod(1 - values, dim=0))

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """β evenly spaced from beta_start to beta_end (Ho et al. 2020, Section 4)."""
        beta_start, beta_end = _number("beta_start", beta_start), _number("beta_end", beta_end)
        return cls.from_betas(_linspace(T, beta_start, beta_end))

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
        """√β evenly spaced: latent diffusion's schedule, which its own code calls "linear" (Rombach et al. 2022)."""
        beta_start, beta_end = _number("beta_start", beta_start), _number("beta_end", beta_end)
        if min(beta_start, beta_end) < 0:
            raise ValueError(f"beta_start and beta_end must not be negative; got {beta_start} and {beta_end}")
        return cls.from_betas(_linspace(T, math.sqrt(beta_start), math.sqrt(beta_end)) ** 2)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """ᾱ(u) ∝ cos²((u + s)/(1 + s)·π/2), with β clipped at max_beta (Nichol & Dhariwal 2021, Equation 17)."""
        s = _number("s", s)
        if s < 0:
            raise ValueError(f"s must not be negative; got {s}")
        u = torch.arange(_check_T(T) + 1, dtype=torch.float64, device="cpu") / T
        return cls._from_bar(torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2, max_beta)

    @classmethod
    def sigmoid(
        cls, T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
    ) -> NoiseSchedule:
        """ᾱ(u) a falling sigmoid over [start, end], normalised to 1 … 0 (Jabri et al. 2022, Algorithm 1)."""
        start, end, tau = _number("start", start), _number("end", end), _number("tau", tau)
        if tau <= 0:
            raise ValueError(f"tau must be positive; got {tau}")
        if start == end:
            raise ValueError(f"start and end must differ; got {start}")
        u = torch.arange(_check_T(T) + 1, dtype=torch.float64, device="cpu") / T
        low, high = torch.sigmoid(torch.tensor([start, end], dtype=torch.float64, device="cpu") / tau)
        bar = (high - torch.sigmoid((start + u * (end - start)) / tau)) / (high - low)
        return cls._from_bar(bar, max_beta)

    @classmethod
    def sigmoid_betas(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """β a rising sigmoid over [−6, 6], scaled to [beta_start, beta_end] (GeoDiff, Xu et al. 2022; diffusers)."""
        beta_start, beta_end = _number("beta_start", beta_start), _number("beta_end", beta_end)
        ramp = torch.sigmoid(_linspace(T, -6.0, 6.0))
        return cls.from_betas(ramp * (beta_end - beta_start) + beta_start)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The table of a diffusers scheduler, its config (a mapping), or a folder holding scheduler_config.json.

        Recomputed in float64 from the config, since the scheduler's own table is float32. Where it rescales to zero
        terminal SNR, ᾱ_T is what that class has: 0, or 2⁻²⁴ in the Euler classes, DPMSolverMultistep and UniPC.

        Raises ValueError, naming the class, for what is no table of β (``schedules.from_diffusers`` takes flows and
        EDM's), and for a beta_schedule that has no discrete ᾱ here.
        """
        config = read(scheduler)
        if (found := kind(config)) != "betas":
            raise ValueError(
                f"the {class_of(config)}Scheduler's process is {'a flow' if found == 'flow' else 'EDM’s'}, no table of "
                "betas: take fastdiff.schedules.from_diffusers"
            )
        config = with_defaults(config)
        T = _check_T(config.get("num_train_timesteps", 1000), "num_train_timesteps")
        name, start, end = config["beta_schedule"], config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        if config.get("trained_betas") is not None:
            schedule = cls.from_betas(config["trained_betas"])
        elif name == "linear":
            schedule = cls.linear(T, start, end)
        elif name == "scaled_linear":
            schedule = cls.scaled_linear(T, start, end)
        elif name == "squaredcos_cap_v2":
            schedule = cls.cosine(T)
        elif name == "sigmoid":
            schedule = cls.sigmoid_betas(T, start, end)
        else:
            known = "linear, scaled_linear, squaredcos_cap_v2, sigmoid"
            raise ValueError(f"beta_schedule is {name!r}; from_diffusers knows {known}, or trained_betas")
        shift = config.get("snr_shift_scale")
        if shift is not None:  # CogVideoX divides ᾱ/(1 − ᾱ) by it
            bar = schedule.alphas_cumprod
            schedule = cls(bar / (_number("snr_shift_scale", shift) * (1 - bar) + bar))
        if config.get("rescale_betas_zero_snr"):
            schedule = schedule.rescale_zero_terminal_snr(terminal_floor(config))
        return schedule

    def rescale_zero_terminal_snr(self, floor: float = 0.0) -> NoiseSchedule:
        """√ᾱ shifted and scaled so that the last is 0 and the first unchanged (Lin et al. 2024, Algorithm 1).

        floor: the least ᾱ, in [0, 1): 0 is the paper's. Samplers leave ᾱ = 0 by a first-order step, but spacings in σ
        (karras and the like) need a largest σ: diffusers' Euler and DPM-Solver have 2⁻²⁴ there, ComfyUI
        4.8973451890853435e-08.
        """
        root = self.alphas
        first, last = root[0], root[-1]
        if len(self) < 2 or not bool(first > last):
            raise ValueError("rescale_zero_terminal_snr needs a schedule of two or more steps that falls")
        bar = ((root - last) * first / (first - last)) ** 2
        if not check_number("floor", floor, 0, 1) < float(bar[0]):
            raise ValueError(f"floor must be below the first ᾱ, {float(bar[0]):g}; got {floor}")
        return NoiseSchedule(bar.clamp(min=floor) if floor else bar)

    @classmethod
    def _from_bar(cls, bar: torch.Tensor, max_beta: float) -> NoiseSchedule:
        if not 0 < _number("max_beta", max_beta) <= 1:
            raise ValueError(f"max_beta must lie in (0, 1]; got {max_beta}")
        ratio = torch.where(bar[:-1] == 0, 0.0, bar[1:] / bar[:-1])
        return cls.from_betas((1 - ratio).clamp(max=max_beta))


@dataclass(frozen=True)
class VESchedule(Schedule):
    """A NoiseSchedule whose states are x_0 + σ ε, the network shown x/√(1 + σ²) (``NoiseSchedule.as_ve``).

    Where ᾱ is 0 there is no such state: there it is ε, as in the table's own states, and samplers leave it by a
    first-order step.
    """

    table: NoiseSchedule
    default_spacing = NoiseSchedule.default_spacing

    @property
    def table_length(self) -> int:
        """T."""
        return len(self.table)

    @property
    def sigma_min(self) -> float:
        """The table's."""
        return self.table.sigma_min

    @property
    def sigma_max(self) -> float:
        """The table's."""
        return self.table.sigma_max

    def sigma_at(self, t: float) -> float:
        """The table's σ/α at t."""
        return self.table.sigma_at(t)

    def level(self, t: float) -> Level:
        """``NoiseSchedule.level`` of the rescaled state."""
        return _ve_level(t, self.table.sigma_at(t))

    def at(self, sigma: float) -> Level:
        """``NoiseSchedule.at`` of the rescaled state."""
        return _ve_level(self.table.time_at(sigma), sigma)

    def least(self) -> Level:
        """The level at index 0."""
        return self.level(0)

    def indexed(self, spacing: str, count: int, steps_offset: int = 0) -> list[Level]:
        """``NoiseSchedule.indexed`` of the rescaled states."""
        return _indexed(self, self.table, spacing, count, steps_offset)


def _indexed(schedule: Schedule, table: NoiseSchedule, spacing: str, count: int, steps_offset: int) -> list[Level]:
    if spacing == "sd3":
        raise ValueError("spacing 'sd3' needs a FlowSchedule; a table of betas takes linspace")
    if spacing != "sgm_uniform":
        return [schedule.level(t) for t in select(len(table), count, spacing, steps_offset)]
    # Evenly in t from T − 1 towards 0, which is not reached; between two indices ln σ is linear.
    times = [(len(table) - 1) * (1 - i / count) for i in range(count)]
    return [schedule.level(t) if t.is_integer() else schedule.at(table.log_sigma_at(t)) for t in times]


def _scale(ratio: float) -> float:
    return 1 / math.sqrt(1 + ratio**2) if math.isfinite(ratio) else 0.0


def _vp_level(t: float, ratio: float) -> Level:
    scale = _scale(ratio)
    return Level(t, scale, ratio * scale if scale else 1.0)


def _ve_level(t: float, ratio: float) -> Level:
    if ratio == math.inf:
        return Level(t, 0.0, 1.0)
    return Level(t, 1.0, ratio, _scale(ratio))


def _sqrt(values: torch.Tensor) -> torch.Tensor:
    # numpy's is correctly rounded everywhere, and it starts no threads: torch's hangs in a forked child.
    return torch.from_numpy(np.sqrt(values.numpy()))


def _vector(name: str, values: Any) -> torch.Tensor:
    try:
        if isinstance(values, torch.Tensor) and values.is_complex():
            raise TypeError("complex")
        if isinstance(values, torch.Tensor):
            vector = values.detach().to("cpu", torch.float64, copy=True)
        else:
            vector = torch.as_tensor(values, dtype=torch.float64, device="cpu").clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a sequence of numbers; got {type(values).__name__}") from error
    if vector.ndim != 1 or vector.numel() < 1:
        raise ValueError(f"{name} must have shape [T] with T >= 1; got {list(vector.shape)}")
    if not bool(vector.isfinite().all()):
        raise ValueError(f"{name} must be finite; index {int((~vector.isfinite()).nonzero()[0])} is not")
    return vector


def _check_T(T: int, name: str = "T") -> int:
    return check_int(name, T, 1, (1 << 24) - 1)  # as many rows as a plan may have, and 128 MB of ᾱ


def _number(name: str, value: float) -> float:
    return float(check_finite_number(name, value))


def _linspace(T: int, start: float, end: float) -> torch.Tensor:
    return torch.linspace(start, end, _check_T(T), dtype=torch.float64, device="cpu")
