"""Schedulers of flow matching, x = (1 − σ) x_0 + σ ε: Heun's method and consistency steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.base import mix, spread
from fastdiff.integrations.diffusers.base_sigmas import FlowStepping
from fastdiff.integrations.diffusers.scheduling_midpoint import TwoCalls
from fastdiff.plan.plan import Plan, Row
from fastdiff.samplers.stages import Churn


class FlowMatchHeunDiscreteScheduler(TwoCalls, theirs.FlowMatchHeunDiscreteScheduler):
    """diffusers' FlowMatchHeunDiscreteScheduler, a step of which is one fused update (``samplers.heun``).

    It differs in this: half-precision samples are noised by ``scale_noise`` in float32 (they are stepped so there
    too); s_churn and its limits stay the same within a run, which begins with the first of a step's two calls.
    """

    _output_class = FlowMatchHeunDiscreteSchedulerOutput
    _second = None
    _dtype_from = "output"

    def _plan(self, start: int, *churn: float) -> Plan:
        """Heun's step from σ̂ = (1 + γ) σ, where diffusers' slope is m σ/σ̂, the network having been shown σ."""
        times, sigmas, rows = self._steps.times, self._steps.sigmas, list[Row]()
        s_noise = Churn(*churn).s_noise  # checks them
        for i in self._first_calls(start):
            here, there = sigmas[i : i + 2]
            high = here * (1 + self._gamma(here, *churn))
            push, h = s_noise * math.sqrt(high**2 - here**2), there - high
            x = {"x": 1.0, "z": push, "m": h * here / high}
            last = i + 1 == len(times)
            anchor = None if last else x | {"m": h * here / high / 2}
            rows.append(Row(t=times[i], alpha=1 - here, sigma=here, p=1.0, q=-here, x=x, anchor=anchor))
            if not last:
                x = {"anchor": 1.0, "m": h / 2}
                rows.append(Row(t=times[i + 1], alpha=1 - there, sigma=there, p=1.0, q=-there, x=x))
        return Plan(tuple(rows), name="flow_heun")

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """x at the list's next σ, tried or mended; arguments and results are diffusers'."""
        self._check_timestep(timestep)
        index, churn, noise = self._index(timestep), (s_churn, s_tmin, s_tmax, s_noise), None
        rows = self._rows(index, *churn)
        # Drawn in both of a step's calls, as there, though the second has no use for it.
        if self._gamma(self._steps.sigmas[index - (not self.state_in_first_order)], *churn) > 0:
            noise = self._draw(generator, model_output, model_output.dtype)
        return self._next(rows, index, model_output, sample, noise, return_dict)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """(1 − σ) x_0 + σ ε at the run's step, in float32 whatever the sample's dtype."""
        sigma = spread([self._steps.sigmas[self._index(timestep)]], sample)
        return mix(1 - sigma, sample, sigma, noise)


class FlowMatchLCMScheduler(FlowStepping, theirs.FlowMatchLCMScheduler):
    """diffusers' FlowMatchLCMScheduler, a step of which is one fused update: x̂_0 noised anew to the next σ.

    It differs in this: half-precision samples are noised by ``scale_noise`` in float32 (they are stepped so there
    too). Where ``scale_factors`` enlarge x̂_0, that is done before the update.
    """

    _output_class = FlowMatchLCMSchedulerOutput
    _second = None
    _dtype_from = "output"
    _scale_factors: Any
    _upscale_mode: Any
    _init_size: torch.Size | None

    def _plan(self, start: int, *options: Any) -> Plan:
        (enlarged,) = options  # then x̂_0 itself stands in the network's output's place
        sigmas, rows = self._steps.sigmas, []
        for t, sigma, following in zip(self._steps.times, sigmas, sigmas[1:], strict=False):
            p, q = (0.0, 1.0) if enlarged else (1.0, -sigma)
            x = {"x0": 1 - following, "z": following}
            rows.append(Row(t=t, alpha=1 - sigma, sigma=sigma, p=p, q=q, x=x))
        return Plan(tuple(rows), name="flow_lcm")

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the list's next σ; arguments and results are diffusers'."""
        self._check_timestep(timestep)
        factors, dtype = self._scale_factors, model_output.dtype
        scaled = bool(factors and self._upscale_mode)
        if scaled and len(self.timesteps) != len(factors) + 1:
            raise ValueError(
                f"scale_factors must have one entry less than timesteps; got {len(factors)} and {len(self.timesteps)}"
            )
        if self._init_size is None or self._step_index is None:
            self._init_size = model_output.size()[2:]
        index = self._index(timestep)
        enlarged = scaled and index < len(factors)
        rows = self._rows(index, enlarged)
        if enlarged:
            size = [round(factors[index] * length) for length in self._init_size]
            x0 = sample.to(torch.float32) - self._steps.sigmas[index] * model_output
            sample = model_output = torch.nn.functional.interpolate(x0, size=size, mode=self._upscale_mode)
        noise = self._draw(generator, sample, torch.float64 if dtype == torch.float64 else torch.float32)
        x, _ = self._advance(rows, index, model_output, sample, noise)
        self._step_index, x = index + 1, x.to(dtype)
        return self._results(return_dict, x)
