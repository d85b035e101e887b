"""SA-Solver: stochastic Adams steps, predicted and corrected."""

from __future__ import annotations

import math
from typing import Any

from diffusers import schedulers as theirs
from torch import Tensor

from fastdiff.integrations.diffusers.scheduling_solvers import SolverStepping
from fastdiff.plan.plan import Plan
from fastdiff.samplers.exponential import (
    Step,
    blend,
    data_step,
    history,
    make_row,
    model_terms,
    node,
    noise_step,
    past,
    phi,
)
from fastdiff.schedules.level import Level
from fastdiff.schedules.spacing import levels


class SASolverScheduler(SolverStepping, theirs.SASolverScheduler):
    """diffusers' SASolverScheduler, a step of which is one fused update (Xue et al. 2023): the row of a call corrects
    the state that led to it and predicts the next, and the anchor carries the corrected state and its noise.

    It differs as DPMSolverMultistepScheduler does. ``tau_func`` is asked for the list's timesteps when a run begins.
    Where σ are changed in its midst, the step before is corrected with the σ that it was predicted with.
    """

    _dtype_from = "sample"
    add_noise = theirs.SASolverScheduler.add_noise  # by the table, not by the list of σ
    tau_func: Any

    def _check_config(self) -> None:
        super()._check_config()
        for name in ("predictor_order", "corrector_order"):
            if self.config[name] not in (1, 2, 3, 4):
                self._refuse(name, "must be 1, 2, 3 or 4")

    @property
    def _noise_form(self) -> bool:
        return bool(self.config.algorithm_type == "noise_prediction")

    def _step(self, here: Level, there: Level, count: int, tau: float) -> Step:
        """x' = (σ'/σ) e^{−τ²h} x + …, whose integral has h grown to (1 + τ²) h; or the same for ε."""
        if self._noise_form:
            return noise_step(here, there, count, eta=tau**2)
        return data_step(here, there, count, extra=tau**2 * (there.log_snr - here.log_snr))

    def _second_order(self, here: Level, there: Level, tau: float) -> float:
        """What diffusers adds to the slope of its second-order integrals for x̂_0, over the step's length h."""
        h = there.log_snr - here.log_snr
        return 0.0 if self._noise_form else (1 + tau**2) * there.alpha * h * (0.5 - phi(2, -(1 + tau**2) * h))

    def _predictor(self, stops: list[Level], order: int, tau: float) -> tuple[Step, float, list[float]]:
        """The last step, and the coefficients of its own output and of the older ones, the newest first."""
        *known, here, there = stops
        step = self._step(here, there, order - 1, tau)
        now, *before = step.outputs([node(level, here, there) for level in known[::-1][: order - 1]])
        if order == 2:
            slope = self._second_order(here, there, tau) / -node(known[-1], here, there)
            now, before = now + slope, [before[0] - slope]
        return step, now, before

    def _corrector(self, stops: list[Level], order: int, tau: float) -> tuple[float, list[float]]:
        """The coefficients, for the step that led here, of the output here and of the older ones."""
        *known, start, here = stops
        step = self._step(start, here, order - 1, tau)
        if order == 1:
            return step.outputs()[0], []
        *before, now = step.outputs([*(node(level, start, here) for level in known[::-1][: order - 2]), 1.0])
        if order == 2:
            slope = self._second_order(start, here, tau)
            now, before = now + slope, [before[0] - slope]
        return now, before

    def _plan(self, start: int, *options: Any) -> Plan:
        config, prediction = self.config, self.config.prediction_type
        bound = 1.0 if self._thresholds else math.inf  # a bound of each sample takes its place
        stops = levels(self._schedule(), spacing=self._spacing(start))
        count, times = len(stops) - 1, self._steps.times[start:]
        left = [count - i if config.lower_order_final else count + 4 for i in range(count)]
        predicts = [min(config.predictor_order, left[i], i + 1) for i in range(count)]
        corrects = [0, *(min(config.corrector_order, left[i] + 1, i + 2) for i in range(count - 1)), 0]
        taus = [float(self.tau_func(t)) for t in times]
        rows = []
        spans = [max(predicts[i] - 1, corrects[i] - 1, 0) for i in range(count)]
        for i, (reads, write) in enumerate(history(spans)):
            here = stops[i]
            output, x = model_terms(self._noise_form, prediction, here, bound), {"x": 1.0}
            if corrects[i]:
                now, before = self._corrector(stops[: i + 1], corrects[i], taus[i - 1])
                x = blend((1.0, {"anchor": 1.0}), (now, output), *past(before))
            step, now, before = self._predictor(stops[: i + 2], predicts[i], taus[i])
            following = blend((step.keep, x), (now, output), *past(before), (step.noise, {"z": 1.0}))
            anchor = None
            if corrects[i + 1]:  # what the next row corrects: this one's corrected state, and its noise
                anchor = blend((step.keep, x), (step.noise, {"z": 1.0}))
            rows.append(
                make_row(here, prediction, bound, following, anchor=anchor, slot=output, reads=reads, write=write)
            )
        return Plan(tuple(rows), name="sa_solver")

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the list's next level; arguments and results are diffusers'."""
        model_output = self._output(model_output, sample)
        noise = self._draw(generator, model_output, model_output.dtype)
        return self._solve(model_output, timestep, sample, noise, return_dict)
