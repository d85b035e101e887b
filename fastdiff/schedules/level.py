"""A level is where a sampler stops; a schedule knows its levels; a prediction type is what a network's output means.

A sampler stops at a list of levels and every network's output is linear in (x, x̂_0, ε), so it needs no more than this
page to serve VP states (x = √ᾱ x_0 + √(1−ᾱ) ε), VE states (x = x_0 + σ ε), EDM's preconditioning and flow matching.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from fastdiff.checks import nearest
from fastdiff.pictures import html

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction", "edm", "score")


@dataclass(frozen=True)
class Level:
    """A state x = alpha·x_0 + sigma·ε, and what the network is given there.

    Args:
        t: the timestep that the network is told: an int is an index of a table, a float a time.
        alpha, sigma: the state's signal and noise.
        c_in: the network is shown c_in·x.
        sigma_data: the data's standard deviation that an EDM network was preconditioned for.
    """

    t: float
    alpha: float
    sigma: float
    c_in: float = 1.0
    sigma_data: float = 1.0

    @property
    def ratio(self) -> float:
        """σ/α, the noise-to-signal ratio that k-diffusion and EDM call sigma; infinite where there is no signal."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """λ = ln(α/σ), half the log-SNR (Lu et al. 2022); infinite at the ends."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha else -math.inf


class Schedule(ABC):
    """What a sampler asks of a noise process; a class that answers it is a schedule like fastdiff's own.

    ``sigma`` is σ/α throughout, the noise-to-signal ratio; a flow's is its own σ, with α = 1 − σ.

    Attributes:
        default_spacing: the ``Spacing`` of samplers that have none of their own.
        default_prediction: what a network that was trained on the process predicts, as a rule. Samplers do not read
            it: their default is epsilon.
        whole_timesteps: whether a network is told whole numbers, to which ``Spacing.quantize`` may round.
    """

    default_spacing: str = "karras"
    default_prediction: str = "epsilon"
    whole_timesteps: bool = True

    @property
    @abstractmethod
    def sigma_min(self) -> float:
        """The least σ."""

    @property
    @abstractmethod
    def sigma_max(self) -> float:
        """The largest σ."""

    @property
    def table_length(self) -> int | None:
        """How many timesteps the process has, where it is discrete; None where it is continuous."""
        return None

    @abstractmethod
    def at(self, sigma: float) -> Level:
        """The level of noise ``sigma``; 0 is the image."""

    @abstractmethod
    def level(self, t: float) -> Level:
        """The level at which the network is told t."""

    def at_ratio(self, ratio: float) -> Level:
        """The level where σ/α is ``ratio``."""
        return self.at(ratio)

    def least(self) -> Level:
        """The level of the least σ."""
        return self.at(self.sigma_min)

    def indexed(self, spacing: str, count: int, steps_offset: int = 0) -> list[Level]:
        """The ``count`` levels of an index spacing; ValueError where the schedule has none of that name."""
        raise ValueError(
            f"spacing {spacing!r} needs a schedule with a table; take karras, exponential, logsnr, polyexponential, "
            "beta, kl_optimal, simple or sgm_uniform"
        )

    def as_ve(self) -> Schedule:
        """The schedule with states x_0 + σ ε (variance exploding); itself where they are, or are no VP states."""
        return self

    def _repr_html_(self) -> str:
        return html.of_schedule(self)

    def plot(self, *others: Schedule) -> Any:
        """A matplotlib figure of α, σ, λ and β, beside those of other schedules (``plots.schedule``)."""
        from fastdiff.plots.schedules import figure

        return figure(self, *others)


def check_schedule(schedule: object) -> Schedule:
    """The schedule, or TypeError for what is none."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a NoiseSchedule, EDMSchedule or FlowSchedule; got {type(schedule).__name__}")
    return schedule


_SILENT = (
    "says nothing of x_0 where ᾱ is 0, as at a flow's σ = 1; take what the network predicts: "
    "prediction='flow_prediction', 'v_prediction' or 'sample'"
)


def x0_terms(prediction: str, level: Level) -> tuple[float, float]:
    """(p, q) of x̂_0 = p·x + q·m for a network's output m at a level.

    epsilon: the noise. v_prediction: α ε − σ x_0 of the state scaled to α² + σ² = 1 (Salimans & Ho 2022, Appendix D).
    sample: x_0. flow_prediction: ε − x_0 (Lipman et al. 2023; Esser et al. 2024). edm: F of Karras et al. 2022,
    Equation 7. score: ∇ log p at the network's input (Song et al. 2021).
    """
    alpha, sigma = level.alpha, level.sigma
    if prediction == "epsilon":
        if alpha == 0:
            raise ValueError(f"epsilon {_SILENT}")
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        square = alpha**2 + sigma**2
        return alpha / square, -sigma / math.sqrt(square)
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "flow_prediction":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction == "edm":
        if alpha == 0:
            raise ValueError("prediction='edm' has no level without signal; the schedule's ᾱ reaches 0")
        data, square = level.sigma_data, level.ratio**2 + level.sigma_data**2
        return data**2 / square / alpha, level.ratio * data / math.sqrt(square)
    if prediction == "score":
        if alpha == 0:
            raise ValueError(f"a score {_SILENT}")
        return 1 / alpha, level.c_in * sigma**2 / alpha
    raise ValueError(f"prediction is {prediction!r}" + nearest(prediction, PREDICTIONS))


def epsilon_terms(prediction: str, level: Level) -> dict[str, float]:
    """ε as a combination of the terms x and m, for the same network.

    Empty where the state holds no noise and the network does not name it (sample, edm).
    """
    alpha, sigma = level.alpha, level.sigma
    if prediction == "epsilon":
        return {"m": 1.0}
    if prediction == "v_prediction":
        square = alpha**2 + sigma**2
        return {"x": sigma / square, "m": alpha / math.sqrt(square)}
    if prediction == "flow_prediction":
        return {"x": 1 / (alpha + sigma), "m": alpha / (alpha + sigma)}
    if prediction == "score":
        return {"m": -level.c_in * sigma}
    if sigma == 0:
        return {}
    p, q = x0_terms(prediction, level)
    return {"x": (1 - alpha * p) / sigma, "m": -alpha * q / sigma}
