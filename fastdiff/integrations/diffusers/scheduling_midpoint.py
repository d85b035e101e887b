"""DPM-Solver-2's schedulers: two network calls a step, the second at the σ half-way in ln σ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.base_sigmas import Pairs, ScaledStepping
from fastdiff.plan.plan import Plan, Row
from fastdiff.samplers.stages import call, moved
from fastdiff.schedules.level import Level


class TwoCalls(Pairs):
    """Those whose lists have the first call of a step and then its second."""

    def _first_calls(self, start: int) -> range:
        if start % 2:
            raise ValueError(f"a run begins with the first of a step's two calls, an even number; got step {start}")
        return range(start, len(self._steps.times), 2)

    def _mend_list(self) -> None:
        """The timestep −1 with which diffusers ends some "trailing" lists is dropped, and the call before it."""
        while (
            len(self.timesteps) > 2 and self.config.get("timestep_spacing") == "trailing" and self.timesteps[-1] == -1
        ):
            zeros = int((self.sigmas == 0).sum())
            self.sigmas = torch.cat([self.sigmas[: -zeros - 2], self.sigmas[-zeros:]])
            self.timesteps = self.timesteps[:-2]
            assert self.num_inference_steps is not None
            self.num_inference_steps -= 1


class TwoCallStepping(TwoCalls, ScaledStepping):
    """Those that walk x_0 + σ ε by a second call at the σ half-way in ln σ."""

    is_scale_input_called = True  # here diffusers does not ask

    # Each has its own: _middle(i) is σ of the second call of the step that begins at number i, and
    # _pair(i, here, middle, *options) are the rows of both calls.
    _middle: Callable[[int], float]
    _pair: Callable[..., tuple[Row, Row]]

    def _plan(self, start: int, *options: Any) -> Plan:
        times, sigmas, rows = self._steps.times, self._steps.sigmas, list[Row]()
        for i in self._first_calls(start):
            here = Level(times[i], 1.0, sigmas[i])
            if i + 1 == len(times) or sigmas[i + 1] == 0:  # Euler's step to the last σ
                rows.append(call(here, self.config.prediction_type, math.inf, moved(here, 1.0, sigmas[i + 1])))
                break
            sigma = self._middle(i)
            if not 0 < sigma < math.inf:
                raise ValueError(f"the σ between {sigmas[i]:g} and {sigmas[i + 1]:g} is {sigma} in float32: add steps")
            rows += self._pair(i, here, Level(times[i + 1], 1.0, sigma), *options)
        return Plan(tuple(rows), name=type(self).__name__)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """The network's input at this call: sample over the state's standard deviation."""
        index = self._index(timestep)
        sigma = self._steps.sigmas[index] if self.state_in_first_order else self._shown(index)
        return sample / self._size(sigma)

    def _shown(self, index: int) -> float:
        """σ of a step's second call."""
        rows = self._rows(index)
        return rows.plan[index - rows.start].sigma


class KDPM2DiscreteScheduler(TwoCallStepping, theirs.KDPM2DiscreteScheduler):
    """diffusers' KDPM2DiscreteScheduler, a step of which is one fused update (``samplers.dpm2``).

    It differs in this: prediction_type "sample" is served too; half-precision samples are stepped, and noised by
    ``add_noise``, in float32. A run begins with the first of a step's two calls.
    """

    _output_class = KDPM2DiscreteSchedulerOutput
    _reads = ("timesteps", "sigmas", "sigmas_interpol")  # diffusers' own, as the timesteps told to the network are
    sigmas_interpol: Tensor

    def _middle(self, index: int) -> float:
        return float(self.sigmas_interpol[index + 1])

    def _pair(self, index: int, here: Level, middle: Level) -> tuple[Row, Row]:
        return midpoint(here, middle, self._steps.sigmas[index + 1], 0.0, self.config.prediction_type)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, num_train_timesteps: int | None = None
    ) -> None:
        """diffusers' lists; all but the timesteps stay on the host."""
        super().set_timesteps(num_inference_steps, device, num_train_timesteps)
        self.sigmas_interpol = self.sigmas_interpol.to("cpu")

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """x at the σ half-way, or at the list's next; arguments and results are diffusers'."""
        index = self._index(timestep)
        return self._next(self._rows(index), index, model_output, sample, None, return_dict)


class KDPM2AncestralDiscreteScheduler(TwoCallStepping, theirs.KDPM2AncestralDiscreteScheduler):
    """diffusers' KDPM2AncestralDiscreteScheduler, a step of which is one fused update (``samplers.dpm2_ancestral``).

    It differs as KDPM2DiscreteScheduler does.
    """

    _output_class = KDPM2AncestralDiscreteSchedulerOutput
    _reads = ("timesteps", "sigmas", "sigmas_interpol", "sigmas_down", "sigmas_up")
    sigmas_interpol: Tensor
    sigmas_down: Tensor
    sigmas_up: Tensor

    def _middle(self, index: int) -> float:
        return float(self.sigmas_interpol[index])

    def _pair(self, index: int, here: Level, middle: Level) -> tuple[Row, Row]:
        down, up = float(self.sigmas_down[index]), float(self.sigmas_up[index])
        return midpoint(here, middle, down, up, self.config.prediction_type)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, num_train_timesteps: int | None = None
    ) -> None:
        """diffusers' lists; all but the timesteps stay on the host."""
        super().set_timesteps(num_inference_steps, device, num_train_timesteps)
        for name in self._reads[2:]:
            setattr(self, name, getattr(self, name).to("cpu"))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the σ half-way, or at the list's next; arguments and results are diffusers'."""
        index, noise = self._index(timestep), None
        rows = self._rows(index)
        if not self.state_in_first_order:
            noise = self._draw(generator, model_output, model_output.dtype)
        return self._next(rows, index, model_output, sample, noise, return_dict)


def midpoint(here: Level, middle: Level, down: float, up: float, prediction: str) -> tuple[Row, Row]:
    """x_m by the slope at ``here``; then from the start to σ_down by the slope at the middle, and noise up to σ'."""
    share = (down - here.sigma) / middle.sigma
    first = call(here, prediction, math.inf, moved(here, 1.0, middle.sigma), {"x": 1.0})
    second = call(middle, prediction, math.inf, {"anchor": 1.0, "x": share, "x0": -share, "z": up})
    return first, second
