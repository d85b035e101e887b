"""Multistep DPM-Solver(++) from an image to its noise, up the list of σ."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from diffusers import schedulers as theirs
from torch import Tensor

from fastdiff.integrations.diffusers.scheduling_solvers import SolverStepping
from fastdiff.plan.plan import Plan
from fastdiff.samplers.dpm_multistep import multistep_rows


class DPMSolverMultistepInverseScheduler(SolverStepping, theirs.DPMSolverMultistepInverseScheduler):
    """diffusers' DPMSolverMultistepInverseScheduler, a step of which is one fused update: ``samplers.dpm_multistep``'s
    formulas with h < 0.

    It differs as DPMSolverMultistepScheduler does. A step between two σ that are the same leaves x as it is. Algorithms
    with noise are refused: its variance would be negative.
    """

    _begin_index = None  # theirs has none

    def _check_config(self) -> None:
        super()._check_config()
        if self.config.algorithm_type.startswith("sde-"):
            self._refuse("algorithm_type", "is not served: towards noise, its noise would have a negative variance")

    def _plan(self, start: int, *options: Any) -> Plan:
        config, schedule, noise_form = self.config, self._schedule(), self.config.algorithm_type == "dpmsolver"
        bound = 1.0 if self._thresholds else math.inf  # a bound of each sample takes its place
        times, sigmas = self._steps.times[start:], self._steps.sigmas[start : len(self._steps.times) + 1]
        stops = [replace(schedule.at(s), t=t) for s, t in zip(sigmas, [*times, times[-1]], strict=True)]
        count = len(times)
        orders = [min(config.solver_order, i + 1) for i in range(count)]
        if config.lower_order_final and len(self._steps.times) < 15:
            orders = [min(order, count - i) for i, order in enumerate(orders)]
        if config.euler_at_final:
            orders[-1] = 1
        rows = multistep_rows(stops, orders, config.prediction_type, bound, noise_form, config.solver_type)
        return Plan(rows, name="dpm_multistep_inverse")

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x at the list's next level; arguments and results are diffusers'."""
        return self._solve(self._output(model_output, sample), timestep, sample, None, return_dict)
