"""Processes without a table of β: EDM's variance-exploding one and flow matching's straight line.

They serve every sampler but DDPM, RePaint, LCM and TCD in place of a ``NoiseSchedule``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdiff.checks import check_number, check_positive
from fastdiff.schedules.level import Level, Schedule


@dataclass(frozen=True)
class EDMSchedule(Schedule):
    """x = x_0 + σ ε, the network shown x/√(σ² + σ_data²) and told ¼ ln σ (Karras et al. 2022, Table 1, column EDM).

    Use it with prediction="edm" for F-networks; a network that returns the denoised image has prediction="sample".
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    whole_timesteps = False

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "sigma_data"):
            if not 1e-100 < check_positive(name, getattr(self, name)) < 1e100:
                raise ValueError(f"{name} is {getattr(self, name)}, whose square is beyond float64")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max; got {self.sigma_min} and {self.sigma_max}")

    def at(self, sigma: float) -> Level:
        """The level of noise σ ≥ 0."""
        check_number("sigma", sigma, 0)
        if sigma == 0:  # t = ln 0 is nothing to tell a network: no sampler calls it there
            return Level(0.0, 1.0, 0.0, 1 / self.sigma_data, self.sigma_data)
        c_in = 1 / math.hypot(sigma, self.sigma_data)
        return Level(math.log(sigma) / 4, 1.0, sigma, c_in, self.sigma_data)

    def sigma_at(self, t: float) -> float:
        """The σ that t = ¼ ln σ stands for."""
        return math.exp(4 * t)

    def level(self, t: float) -> Level:
        """The level at which the network is told t = ¼ ln σ."""
        return self.at(self.sigma_at(t))


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """x = (1 − σ) x_0 + σ ε, the network told T·σ (Lipman et al. 2023; Esser et al. 2024).

    ``shift`` s moves every σ to s σ/(1 + (s − 1) σ) (Esser et al. 2024, Equation 23): more steps where there is noise.
    """

    shift: float = 1.0
    T: int = 1000
    default_spacing = "trailing"

    def __post_init__(self) -> None:
        for name in ("shift", "T"):
            if not 1e-12 < check_positive(name, getattr(self, name)) < 1e100:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 1e-12 and 1e100")

    @classmethod
    def for_tokens(
        cls,
        tokens: int,
        *,
        base_tokens: int = 256,
        max_tokens: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        T: int = 1000,
    ) -> FlowSchedule:
        """The resolution-dependent shift exp(μ), μ linear in the number of image tokens (as FLUX.1 is sampled).

        μ is base_shift at base_tokens and max_shift at max_tokens; the tokens are the latents' patches.
        """
        for name, count in (("tokens", tokens), ("base_tokens", base_tokens), ("max_tokens", max_tokens)):
            check_positive(name, count)
        for name, value in (("base_shift", base_shift), ("max_shift", max_shift)):
            check_number(name, value, -100.0, 100.0)
        if base_tokens == max_tokens:
            raise ValueError(f"base_tokens and max_tokens must differ; got {base_tokens}")
        slope = (max_shift - base_shift) / (max_tokens - base_tokens)
        mu = base_shift + slope * (tokens - base_tokens)
        if not abs(mu) < 700:
            raise ValueError(f"tokens is {tokens}, for which the shift e^{mu:g} is beyond float64")
        return cls(math.exp(mu), T)

    @property
    def sigma_min(self) -> float:
        """σ of the last training timestep, shifted."""
        return self.shifted(1 / self.T)

    @property
    def sigma_max(self) -> float:
        return 1.0

    def shifted(self, sigma: float) -> float:
        """An unshifted σ where ``shift`` moves it."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def at(self, sigma: float) -> Level:
        """The level of noise σ in [0, 1], shift included."""
        check_number("a flow's sigma", sigma, 0, 1)
        return Level(sigma * self.T, 1.0 - sigma, sigma)

    def sigma_at(self, t: float) -> float:
        """The σ that the network's t = T·σ stands for."""
        return t / self.T

    def level(self, t: float) -> Level:
        """The level at which the network is told t = T·σ."""
        return self.at(self.sigma_at(t))

    def at_ratio(self, ratio: float) -> Level:
        """The level where σ/α = σ/(1 − σ) is ``ratio``."""
        return self.at(ratio / (1 + ratio))

    def indexed(self, spacing: str, count: int, steps_offset: int = 0) -> list[Level]:
        """Evenly in the unshifted σ: trailing from 1 down in steps of 1/count, linspace from 1 to 1/T."""
        if spacing == "trailing":
            unshifted = [1 - i / count for i in range(count)]
        elif spacing == "linspace":
            least = 1 / self.T
            unshifted = [1 + (least - 1) * i / (count - 1) if count > 1 else 1.0 for i in range(count)]
        else:
            raise ValueError(
                f"spacing {spacing!r} needs a NoiseSchedule; a flow takes trailing, linspace or a sigma spacing"
            )
        return [self.at(self.shifted(u)) for u in unshifted]
