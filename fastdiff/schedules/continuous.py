"""Processes without a table of β: EDM's variance-exploding one and flow matching's straight line.

docs/samplers.md says which samplers walk them. Their networks are told float32 times, in any number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdiff.checks import check_choice, check_number, check_positive
from fastdiff.schedules.level import Level, Schedule

TABLE = 1000  # the σ that ComfyUI lists of a continuous process, of which "simple" takes some


@dataclass(frozen=True)
class EDMSchedule(Schedule):
    """x = x_0 + σ ε, the network shown x/√(σ² + σ_data²) and told ¼ ln σ (Karras et al. 2022, Table 1, column EDM).

    Use it with prediction="edm" for F-networks; a network that returns the denoised image has prediction="sample".
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    default_prediction = "edm"
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

    def indexed(self, spacing: str, count: int, steps_offset: int = 0) -> list[Level]:
        """simple: of 1000 σ, even in ln σ, every 1000/count-th; sgm_uniform: evenly in t, σ_min not reached."""
        high, low = math.log(self.sigma_max), math.log(self.sigma_min)
        if spacing == "simple":
            shares = [int(i * TABLE / count) / (TABLE - 1) for i in range(count)]
        elif spacing == "sgm_uniform":
            shares = [i / count for i in range(count)]
        else:
            return super().indexed(spacing, count, steps_offset)
        return [self.at(math.exp(high + share * (low - high)) if share else self.sigma_max) for share in shares]


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """x = (1 − σ) x_0 + σ ε, the network told T·σ (Lipman et al. 2023; Esser et al. 2024).

    ``shift`` s moves every σ to s σ/(1 + (s − 1) σ) (Esser et al. 2024, Equation 23): more steps where there is noise.
    ``shift_terminal`` then stretches a walk's 1 − σ so that its last σ before 0 is this one (LTX-Video). A walk of one
    step is from 1 to 0 (diffusers divides 0 by 0 there).
    """

    shift: float = 1.0
    T: int = 1000
    shift_terminal: float | None = None
    default_spacing = "trailing"
    default_prediction = "flow_prediction"

    def __post_init__(self) -> None:
        if self.shift_terminal is not None and not 0 < check_number("shift_terminal", self.shift_terminal, 0, 1) < 1:
            raise ValueError(f"shift_terminal must be between 0 and 1; got {self.shift_terminal}")
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
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ) -> FlowSchedule:
        """The resolution-dependent shift exp(μ), μ linear in the number of image tokens (as FLUX.1 is sampled).

        μ is base_shift at base_tokens and max_shift at max_tokens; the tokens are the latents' patches. With
        time_shift_type="linear" the shift is μ itself.
        """
        check_choice("time_shift_type", time_shift_type, ("exponential", "linear"))
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
        return cls(math.exp(mu) if time_shift_type == "exponential" else mu, T, shift_terminal)

    @property
    def sigma_min(self) -> float:
        """σ of the last training timestep, shifted; or ``shift_terminal``."""
        return self.shifted(1 / self.T) if self.shift_terminal is None else self.shift_terminal

    @property
    def sigma_max(self) -> float:
        return 1.0

    def shifted(self, sigma: float) -> float:
        """An unshifted σ where ``shift`` moves it."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def at(self, sigma: float) -> Level:
        """The level of noise σ in [0, 1], shift included."""
        sigma = check_number("a flow's sigma", sigma, 0, 1)
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
        """Evenly in the unshifted σ.

        trailing: from 1 down in steps of 1/count; simple: the same among 1000 entries, rounded up. linspace: from 1 to
        1/T; sd3: from 1 to the shifted 1/T, so that the shift is applied to it twice, as in the list of diffusers'
        FlowMatchEulerDiscreteScheduler without dynamic shifting, which SD3 is sampled by; sgm_uniform: the same with
        one more step, σ_min not reached, as in ComfyUI.
        """
        if spacing == "trailing":
            unshifted = [1 - i / count for i in range(count)]
        elif spacing == "simple":
            unshifted = [1 - int(i * TABLE / count) / TABLE for i in range(count)]
        elif spacing in ("linspace", "sd3", "sgm_uniform"):
            least = 1 / self.T if spacing == "linspace" else self.shifted(1 / self.T)
            gaps = count if spacing == "sgm_uniform" else max(count - 1, 1)
            unshifted = [1 + (least - 1) * i / gaps for i in range(count)]
        else:
            raise ValueError(
                f"spacing {spacing!r} needs a NoiseSchedule; a flow takes trailing, linspace, sd3, simple, sgm_uniform "
                "or a sigma spacing"
            )
        sigmas = [self.shifted(u) for u in unshifted]
        if self.shift_terminal is not None and count > 1:
            stretch = (1 - self.shift_terminal) / (1 - sigmas[-1])
            sigmas = [*(1 - (1 - sigma) * stretch for sigma in sigmas[:-1]), self.shift_terminal]
        return [self.at(sigma) for sigma in sigmas]
