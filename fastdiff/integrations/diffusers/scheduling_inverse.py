"""Multistep DPM-Solver(++) from an image to its noise, up the list of σ."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

from diffusers import schedulers as theirs
from torch import Tensor

from fastdiff.integrations.diffusers.scheduling_solvers import SolverStepping
from fastdiff.plan.plan import Plan
from fastdiff.samplers.exponential import (
    blend,
    data_step,
    history,
    make_row,
    model_terms,
    node,
    noise_step,
    past,
)


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
        config, schedule = self.config, self._schedule()
        prediction, noise_form = config.prediction_type, config.algorithm_type == "dpmsolver"
        bound = 1.0 if self._thresholds else math.inf  # a bound of each sample takes its place
        times, sigmas = self._steps.times[start:], self._steps.sigmas[start : len(self._steps.times) + 1]
        stops = [replace(schedule.at(s), t=t) for s, t in zip(sigmas, [*times, times[-1]], strict=True)]
        count, rows = len(times), []
        orders = [min(config.solver_order, i + 1) for i in range(count)]
        if config.lower_order_final and len(self._steps.times) < 15:
            orders = [min(order, count - i) for i, order in enumerate(orders)]
        if config.euler_at_final:
            orders[-1] = 1
        for i, (reads, write) in enumerate(history([order - 1 for order in orders])):
            here, there, used = stops[i], stops[i + 1], orders[i] - 1
            rule = "published" if used == 2 else config.solver_type
            output = model_terms(noise_form, prediction, here, bound)
            if there.ratio == here.ratio:
                x = {"x": 1.0}
            else:
                if any(a.ratio == b.ratio for a, b in pairwise(stops[i - used : i + 1])):
                    used = 0  # no slope between two outputs at one σ
                step = noise_step(here, there, used, rule) if noise_form else data_step(here, there, used, rule)
                now, *before = step.outputs([node(stops[i - k], here, there) for k in range(1, used + 1)])
                x = blend((step.keep, {"x": 1.0}), (now, output), *past(before))
            rows.append(make_row(here, prediction, bound, x, slot=output, reads=reads, write=write))
        return Plan(tuple(rows), name="dpm_multistep_inverse")

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
