"""What schedulers share that walk a list of σ: the list's levels, noising by it, and the network's scaled input."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from fastdiff.integrations.diffusers.base import Stepping, all_apart, last_apart, mix, spread
from fastdiff.schedules.continuous import EDMSchedule
from fastdiff.schedules.spacing import Spacing

logger = logging.getLogger(__name__)


class SigmaList(Stepping):
    """What they share: the list of σ."""

    _may_stay: ClassVar[bool] = False  # whether a step may lead to the σ that it begins at: methods without a history

    stretch_shift_to_terminal: Callable[[Any], Any]  # diffusers', of those that have shift_terminal

    def _table(self) -> Tensor:
        """diffusers' table of ᾱ; a level's σ comes from the list."""
        return self.alphas_cumprod.cummin(0).values  # under rescale_betas_zero_snr the last was raised, above others

    def _spacing(self, start: int) -> Spacing:
        """The levels from step ``start`` on: diffusers' own list of float32 σ, as float64 numbers."""
        steps = self._steps
        return self._walk(steps.sigmas[start : len(steps.times) + 1], steps.times[start:])  # "log_linear" has one more

    def _walk(self, sigmas: list[float], times: list[float]) -> Spacing:
        """These levels, which must fall but for rounding."""
        if not all(map(math.isfinite, sigmas)):
            raise ValueError(f"{type(self).__name__}: sigmas must be finite; its list is {sigmas}")
        falling = all_apart(sigmas) if self._may_stay else last_apart(sigmas)
        for i, (here, there) in enumerate(pairwise(falling)):
            if not there < here:
                raise ValueError(
                    f"{type(self).__name__} walks down: σ must fall from each step to the next, but of its {len(times)}"
                    f" steps number {i} has {here:g} and the next {there:g}; take fewer steps, another steps_offset or"
                    " sigma_min"
                )
        if len(set(times)) < len(times):  # rounded timesteps repeat where σ do not
            times = [t - 1e-6 * i for i, t in enumerate(times)]
        return Spacing(sigmas=falling, timesteps=times)

    def _sigmas_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """σ for each sample: at its timestep, or at the run's step where a run was begun by set_begin_index."""
        sigmas = self._list().sigmas
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps.flatten().tolist()]
        else:
            at = self._begin_index if self._step_index is None else self._step_index
            indices = [at] * timesteps.shape[0]
        return spread([sigmas[i] for i in indices], like)

    def _gamma(self, sigma: float, s_churn: float, s_tmin: float, s_tmax: float, *_: float) -> float:
        """EDM's γ, by which σ is raised before a step."""
        inside = s_tmin <= sigma <= s_tmax
        return min(s_churn / (len(self._steps.sigmas) - 1), math.sqrt(2) - 1) if inside else 0.0

    def _check_timestep(self, timestep: Any) -> None:
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(
                f"timestep must be one of scheduler.timesteps, which are floating point; got the integer {timestep}"
            )


class Pairs(SigmaList):
    """Those that make two calls a step, one after the other in the list; runs begin with a first one."""

    _has_history = True

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first of its two."""
        return self._step_index is None or (self._step_index - (self._steps.start or 0)) % 2 == 0

    def _first_place(self, timestep: Any) -> int:
        place = super()._first_place(timestep)
        return place + place % 2


class FlowStepping(SigmaList):
    """Those whose states are (1 − σ) x_0 + σ ε, and that noise images by scale_noise."""

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 − σ) x_0 + σ ε at each timestep (or at the run's step), in float32 whatever the sample's dtype."""
        sigma = self._sigmas_at(timestep, sample)
        return mix(1 - sigma, sample, sigma, noise)


class SigmaStepping(SigmaList):
    """Those that noise images by add_noise."""

    def _alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The state's signal and noise at entries of the list."""
        return sigma.new_ones(()), sigma

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α x_0 + σ ε at each timestep (or at the run's step), computed in float32 whatever the samples' dtype."""
        alpha, sigma = self._alpha_sigma(self._sigmas_at(timesteps, original_samples))
        return mix(alpha, original_samples, sigma, noise)


class ScaledStepping(SigmaStepping):
    """Those whose network is shown a scaled state."""

    is_scale_input_called: bool

    def _size(self, sigma: float) -> float:
        """The state's standard deviation for data of unit variance."""
        return math.sqrt(sigma**2 + 1)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """The network's input at this step: sample over the state's standard deviation."""
        index = self._index(timestep)
        sigma = self._steps.sigmas[index]
        self.is_scale_input_called = True
        return sample / self._size(sigma)

    def _check_scaled(self) -> None:
        if not self.is_scale_input_called:
            self.is_scale_input_called = True  # say it once
            logger.warning("scale_model_input was not called before step: the network must be shown the scaled state")


class EDMStepping(ScaledStepping):
    """Those whose network has EDM's preconditioning."""

    def _schedule(self) -> EDMSchedule:
        return EDMSchedule(sigma_data=self.config.sigma_data)

    def _size(self, sigma: float) -> float:
        return math.hypot(sigma, self.config.sigma_data)
