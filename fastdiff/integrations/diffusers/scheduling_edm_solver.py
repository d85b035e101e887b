"""Multistep DPM-Solver++ on EDM's states x_0 + σ ε."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import schedulers as theirs
from torch import Tensor

from fastdiff.integrations.diffusers.base_sigmas import EDMStepping
from fastdiff.plan.plan import Plan
from fastdiff.samplers import dpm_multistep
from fastdiff.schedules.spacing import Spacing


class EDMSolverStepping(EDMStepping):
    """What they share: EDM's preconditioning, and a history of x̂_0."""

    _second = None
    _predictions = ("epsilon", "v_prediction")
    _has_history = True
    is_scale_input_called = True  # here diffusers does not ask

    def _check_config(self) -> None:
        super()._check_config()
        if self.config.solver_order not in (1, 2, 3):
            self._refuse("solver_order", "must be 1, 2 or 3")

    def _missing(self, value: float, times: list[float]) -> int:
        return len(times) - 1  # as diffusers

    def _walk(self, sigmas: list[float], times: list[float]) -> Spacing:
        if self.config.final_sigmas_type == "sigma_min":  # stands there twice; the first was rounded as a power
            sigmas = [*sigmas[:-1], min(sigmas[-2:])]
        return super()._walk(sigmas, times)

    @property
    def _adds_noise(self) -> bool:
        return bool(self.config.algorithm_type.startswith("sde-"))

    def _plan(self, start: int, *options: Any) -> Plan:
        config = self.config
        plan = dpm_multistep(
            self._schedule(), prediction="edm", clip=1.0 if self._thresholds else None, order=config.solver_order,
            solver_type=config.solver_type, lower_order_final=config.lower_order_final and len(self._steps.times) < 15,
            euler_at_final=config.euler_at_final, eta=float(self._adds_noise), spacing=self._spacing(start),
        )  # fmt: skip
        if config.prediction_type == "epsilon":
            return plan
        # diffusers' v is EDM's F with its sign changed.
        return replace(plan, rows=tuple(replace(row, q=-row.q) for row in plan))


class EDMDPMSolverMultistepScheduler(EDMSolverStepping, theirs.EDMDPMSolverMultistepScheduler):
    """diffusers' EDMDPMSolverMultistepScheduler, a step of which is one fused update (``samplers.dpm_multistep``).

    It differs as DPMSolverMultistepScheduler does, and third-order steps with noise, at which theirs fails, are served.
    """

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the list's next σ; arguments and results are diffusers'."""
        self._check_listed()
        index, noise = self._index(timestep), None
        if self._adds_noise:
            noise = self._draw(generator, model_output, torch.promote_types(sample.dtype, model_output.dtype))
        return self._next(self._rows(index), index, model_output, sample, noise, return_dict)
