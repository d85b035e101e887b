"""Processes without a table of β: EDM's variance-exploding one and flow matching's straight line.

They serve every sampler that walks levels (``schedules.spacing``) in place of a ``NoiseSchedule``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdiff.checks import check_number
from fastdiff.schedules.level import Level


@dataclass(frozen=True)
class EDMSchedule:
    """x = x_0 + σ ε, the network shown x/√(σ² + σ_data²) and told ¼ ln σ (Karras et al. 2022, Table 1, column EDM).

    Use it with prediction="edm" for F-networks; a network that returns the denoised image has prediction="sample".
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    default_spacing = "karras"

    def __post_init__(self) -> None:
        _positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma_data=self.sigma_data)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max; got {self.sigma_min} and {self.sigma_max}")

    def at(self, sigma: float, *, ve: bool = True) -> Level:
        """The level of noise σ ≥ 0. ``ve`` is there for ``NoiseSchedule.at``'s sake: these states are VE."""
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigma must be finite and not negative; got {sigma}")
        if sigma == 0:  # t = ln 0 is nothing to tell a network: no sampler calls it there
            return Level(0.0, 1.0, 0.0, 1 / self.sigma_data, self.sigma_data)
        c_in = 1 / math.hypot(sigma, self.sigma_data)
        return Level(math.log(sigma) / 4, 1.0, sigma, c_in, self.sigma_data)

    def sigma_at(self, t: float) -> float:
        """The σ that t = ¼ ln σ stands for."""
        return math.exp(4 * t)


@dataclass(frozen=True)
class FlowSchedule:
    """x = (1 − σ) x_0 + σ ε, the network told T·σ (Lipman et al. 2023; Esser et al. 2024).

    ``shift`` s moves every σ to s σ/(1 + (s − 1) σ) (Esser et al. 2024, Equation 23): more steps where there is noise.
    """

    shift: float = 1.0
    T: int = 1000
    default_spacing = "trailing"

    def __post_init__(self) -> None:
        _positive(shift=self.shift, T=self.T)

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
        _positive(tokens=tokens, base_tokens=base_tokens, max_tokens=max_tokens)
        for name, value in (("base_shift", base_shift), ("max_shift", max_shift)):
            check_number(name, value, -100.0, 100.0)
        if base_tokens == max_tokens:
            raise ValueError(f"base_tokens and max_tokens must differ; got {base_tokens}")
        slope = (max_shift - base_shift) / (max_tokens - base_tokens)
        return cls(math.exp(base_shift + slope * (tokens - base_tokens)), T)

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

    def at(self, sigma: float, *, ve: bool = False) -> Level:
        """The level of noise σ in [0, 1], shift included. ``ve`` is there for ``NoiseSchedule.at``'s sake alone."""
        if not 0 <= sigma <= 1:
            raise ValueError(f"a flow's sigma must be in [0, 1]; got {sigma}")
        return Level(sigma * self.T, 1.0 - sigma, sigma)

    def sigma_at(self, t: float) -> float:
        """The σ that the network's t = T·σ stands for."""
        return t / self.T


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number; got {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite; got {value}")
