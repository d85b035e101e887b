"""Schedulers whose noise is a Brownian path's increments, by torchsde: importable where torchsde is installed.

The path is diffusers' own (``BrownianTreeNoiseSampler``), from the same seed, so that results are diffusers'. It is
drawn beside the update and costs more than the update itself. ``use_fastdiff_noise`` takes fastdiff's stream instead,
inside the update: independent normals, which is what increments over intervals that do not overlap are. The two calls
of a DPMSolverSDE step do overlap, from σ to the middle and from σ to σ'; their noises are independent then, as in
``samplers.dpmpp_sde``, and each state has the same distribution given the one before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler, DPMSolverSDESchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.scheduling_edm_solver import EDMSolverStepping
from fastdiff.integrations.diffusers.scheduling_midpoint import TwoCallStepping
from fastdiff.plan.plan import Row
from fastdiff.samplers.euler_ancestral import down_and_up
from fastdiff.samplers.stages import call, moved
from fastdiff.schedules.level import Level


class DPMSolverSDEScheduler(TwoCallStepping, theirs.DPMSolverSDEScheduler):
    """diffusers' DPMSolverSDEScheduler, a step of which is one fused update (``samplers.dpmpp_sde``).

    It differs in this: prediction_type "sample" is served too; half-precision samples are stepped, and noised by
    ``add_noise``, in float32. A run begins with the first of a step's two calls; ``s_noise`` stays the same in it.
    """

    _output_class = DPMSolverSDESchedulerOutput

    noise_sampler: Any
    noise_sampler_seed: int | None

    def _middle(self, index: int) -> float:
        return math.sqrt(self._steps.sigmas[index] * self._steps.sigmas[index + 1])

    def _shown(self, index: int) -> float:
        return self._middle(index - 1)

    def _pair(self, index: int, here: Level, middle: Level, s_noise: float) -> tuple[Row, Row]:
        """x_m by x̂_0 at ``here``, then from the start by x̂_0 at the middle; each with noise up to its σ."""
        prediction = self.config.prediction_type
        half, half_up = down_and_up(here, middle, 1.0)
        down, up = down_and_up(here, Level(0.0, 1.0, self._steps.sigmas[index + 1]), 1.0)
        share = down / here.sigma
        first = call(here, prediction, math.inf, moved(here, 1.0, half) | {"z": s_noise * half_up}, {"x": 1.0})
        second = call(middle, prediction, math.inf, {"anchor": share, "x0": 1 - share, "z": s_noise * up})
        return first, second

    def _increment(self, index: int, sample: Tensor) -> Tensor | None:
        """The path's normalised increment of this call, or None where there is none or the update draws it."""
        first = index if self.state_in_first_order else index - 1
        if self._steps.sigmas[first + 1] == 0:
            return None
        if self.noise_sampler is None:
            least, most = float(self.sigmas[self.sigmas > 0].min()), float(self.sigmas.max())
            self.noise_sampler = BrownianTreeNoiseSampler(sample, least, most, self.noise_sampler_seed)
        t, following = (-self.sigmas[i].log() for i in (first, first + 1))
        if index == first:
            following = t + (following - t) * 0.5
        return self.noise_sampler((-t).exp(), (-following).exp())

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, s_noise: float = 1.0
    ) -> Any:
        """x at the σ half-way, or at the list's next; arguments and results are diffusers'."""
        index, noise = self._index(timestep), None
        rows = self._rows(index, s_noise)
        if self._steps.key is None:
            noise = self._increment(index, sample)
        return self._next(rows, index, model_output, sample, noise, return_dict)


class CosineDPMSolverMultistepScheduler(EDMSolverStepping, theirs.CosineDPMSolverMultistepScheduler):
    """diffusers' CosineDPMSolverMultistepScheduler, a step of which is one fused update (``samplers.dpm_multistep``).

    It differs as DPMSolverMultistepScheduler does, and third-order steps, at which theirs fails, are served.
    """

    _adds_noise = True
    noise_sampler: Any

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the list's next σ; arguments and results are diffusers'."""
        self._check_listed()
        index, noise = self._index(timestep), None
        if self._steps.key is None:
            if self.noise_sampler is None:
                several = isinstance(generator, list)
                seed = [g.initial_seed() for g in generator] if several else generator and generator.initial_seed()
                like = model_output.to(torch.promote_types(sample.dtype, model_output.dtype))
                self.noise_sampler = BrownianTreeNoiseSampler(like, self.config.sigma_min, self.config.sigma_max, seed)
            noise = self.noise_sampler(self.sigmas[index], self.sigmas[index + 1]).to(model_output.device)
        return self._next(self._rows(index), index, model_output, sample, noise, return_dict)
