"""Schedulers that walk a list of σ: x = x_0 + σ ε, the network being shown x/√(σ² + 1)."""

from __future__ import annotations

from typing import Any

from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.core import Stepping, last_apart, mix, spread
from fastdiff.plan import Plan
from fastdiff.samplers import lms
from fastdiff.samplers.spacing import Schedule
from fastdiff.schedule import NoiseSchedule


class SigmaStepping(Stepping):
    """What they share: the list of σ, noising by it, and the network's input."""

    _schedule_of: tuple[Tensor, NoiseSchedule] | None = None

    def _schedule(self) -> Schedule:
        """diffusers' table of ᾱ, as float64 numbers; a level's σ comes from the list."""
        if self._schedule_of is None or self._schedule_of[0] is not self.alphas_cumprod:
            # Under rescale_betas_zero_snr the last entry was raised, above others.
            self._schedule_of = self.alphas_cumprod, NoiseSchedule(self.alphas_cumprod.cummin(0).values)
        return self._schedule_of[1]

    def _walk(self, start: int) -> dict[str, Any]:
        """The levels from step ``start`` on: diffusers' own list of float32 σ, as float64 numbers."""
        times = self._steps.times[start:]
        if len(set(times)) < len(times):  # rounded timesteps repeat where σ do not
            times = [t - 1e-6 * i for i, t in enumerate(times)]
        return {"sigmas": last_apart(self._steps.sigmas[start:]), "timesteps": times}

    def _alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The state's signal and noise at list entries σ."""
        return sigma.new_ones(()), sigma

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α x_0 + σ ε at each timestep (or at the run's step), computed in float32 whatever the samples' dtype."""
        alpha, sigma = self._alpha_sigma(self._sigmas_at(timesteps, original_samples))
        return mix(alpha, original_samples, sigma, noise)

    def _sigmas_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        sigmas = self._list().sigmas
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps.flatten().tolist()]
        else:
            at = self._begin_index if self._step_index is None else self._step_index
            indices = [at] * timesteps.shape[0]
        return spread([sigmas[i] for i in indices], like)


class ScaledStepping(SigmaStepping):
    """Those of them whose states are x_0 + σ ε."""

    is_scale_input_called: bool

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """The network's input, sample/√(σ² + 1), at this step."""
        sigma = self._steps.sigmas[self._index(timestep)]
        self.is_scale_input_called = True
        return sample / (sigma**2 + 1) ** 0.5


class LMSDiscreteScheduler(ScaledStepping, theirs.LMSDiscreteScheduler):
    """diffusers' LMSDiscreteScheduler, a step of which is one fused update (``samplers.lms``).

    It differs in this: coefficients are integrated exactly, theirs numerically to 1e-4; a run that begins in the
    middle of the list (image to image) starts at order 1, where theirs takes the coefficients of an order for which it
    has no outputs yet; half-precision samples are stepped, and noised by ``add_noise``, in float32. ``order`` must be
    in 1 … 4 and stay the same within a run.
    """

    _has_history = True

    def _plan(self, start: int, *options: Any) -> Plan:
        return lms(self._schedule(), prediction=self.config.prediction_type, order=options[0], **self._walk(start))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> Any:
        """x at the list's next σ; arguments and results are diffusers'."""
        index = self._index(timestep)
        x, x0 = self._advance(self._rows(index, order), index, model_output, sample)
        self._step_index = index + 1
        return LMSDiscreteSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)
