"""Schedulers of distilled networks: latent consistency and trajectory consistency."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.scheduling_vp import TableStepping
from fastdiff.plan.plan import Plan
from fastdiff.samplers import lcm, tcd
from fastdiff.samplers.stages import moved
from fastdiff.schedules.spacing import Spacing


class LCMScheduler(TableStepping, theirs.LCMScheduler):
    """diffusers' LCMScheduler, a step of which is one fused update (``samplers.lcm``).

    It differs in this: the list's last step adds no noise, though theirs adds some there where the list was cut by
    ``strength`` (the generator is drawn from all the same); half-precision samples are stepped, and noised by
    ``add_noise``, in float32.
    """

    _output_class = LCMSchedulerOutput

    def _plan(self, start: int, *options: Any) -> Plan:
        scaling = self.config.timestep_scaling
        plan = lcm(
            self._schedule(), spacing=Spacing(timesteps=self._steps.times), prediction=self.config.prediction_type,
            clip=self._clip, timestep_scaling=scaling,
        )  # fmt: skip
        rows = []
        for row in plan:  # with the anchor that brings out f
            size = math.hypot(scaling * row.t, 0.5)
            rows.append(replace(row, anchor={"x0": scaling * row.t / size, "x": (0.5 / size) ** 2}))
        return replace(plan, rows=tuple(rows))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the list's next timestep, and the denoised image; arguments and results are diffusers'."""
        last = self._check_listed() - 1
        index, noise = self._index(timestep), None
        if index != last:
            noise = self._draw(generator, sample, self._result_dtype(sample.dtype, model_output.dtype))
        return self._next(self._rows(index), index, model_output, sample, noise, return_dict)


class TCDScheduler(TableStepping, theirs.TCDScheduler):
    """diffusers' TCDScheduler, a step of which is one fused update (``samplers.tcd``).

    It differs as LCMScheduler does. clip_sample and thresholding do nothing, as in diffusers.
    """

    _output_class = TCDSchedulerOutput
    _clip = None

    def _check_config(self) -> None:
        super()._check_config()
        self._thresholds = False

    def _plan(self, start: int, *options: Any) -> Plan:
        (eta,) = options
        schedule, times = self._schedule(), self._steps.times
        spacing = self._spacing(times, float(schedule.alphas_cumprod[0]))
        plan = tcd(schedule, prediction=self.config.prediction_type, eta=eta, spacing=spacing)
        rows = []
        for row, following in zip(plan, [*times[1:], 0], strict=True):  # with the anchor that brings out x_s
            landing = schedule.level(math.floor((1 - eta) * following + 1e-6))
            here = schedule.level(row.t)
            rows.append(replace(row, anchor=moved(here, landing.alpha, landing.sigma)))
        return replace(plan, rows=tuple(rows))

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.3,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """x at the list's next timestep, and x_s before its noise; arguments and results are diffusers'."""
        last = self._check_listed() - 1
        index, noise = self._index(timestep), None
        rows = self._rows(index, eta)
        if eta > 0 and index != last:
            noise = self._draw(generator, sample, self._result_dtype(sample.dtype, model_output.dtype))
        return self._next(rows, index, model_output, sample, noise, return_dict)
