"""Schedulers of states cos φ x_0 + sin φ ε: consistency steps, and the improved pseudo-linear multistep method."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_scm import SCMSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.base import Stepping
from fastdiff.plan.plan import Plan, Row
from fastdiff.samplers.exponential import blend, history, past
from fastdiff.samplers.pndm import ADAMS_BASHFORTH


class SCMScheduler(Stepping, theirs.SCMScheduler):
    """diffusers' SCMScheduler, a step of which is one fused update: x̂_0 noised anew (Lu & Song 2025).

    It differs in this: half-precision samples are stepped in float32.
    """

    _output_class = SCMSchedulerOutput
    _predictions = ("trigflow",)

    def _plan(self, start: int, *options: Any) -> Plan:
        """x̂_0 = cos s x − sin s m; x' = cos s' x̂_0 + sin s' σ_data z."""
        data, rows = self.config.sigma_data, []
        for here, there in pairwise(self._steps.times):
            p, q = math.cos(here), -math.sin(here)
            x = {"x0": math.cos(there), "z": math.sin(there) * data}
            rows.append(Row(t=here, alpha=p, sigma=-q, p=p, q=q, x=x))
        return Plan(tuple(rows), name="scm")

    def _result_dtype(self, sample: torch.dtype, output: torch.dtype) -> torch.dtype:
        return torch.promote_types(torch.promote_types(sample, output), torch.float32)  # the noise is float32

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the list's next angle; arguments and results are diffusers'."""
        self._check_listed()
        index = self._index(timestep)
        noise = self._draw(generator, model_output, torch.float32)
        x, x0 = self._advance(self._rows(index), index, model_output, sample, noise)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        assert x0 is not None
        x, x0 = x.to(torch.promote_types(dtype, torch.float32)), x0.to(dtype)
        self._step_index = index + 1
        return self._results(return_dict, x, x0)


class IPNDMScheduler(Stepping, theirs.IPNDMScheduler):
    """diffusers' IPNDMScheduler, a step of which is one fused update (Zhang & Chen 2023; Liu et al. 2022, Equation 9).

    It differs in this: half-precision samples are stepped in float32. What was assigned to ``ets`` is not read.
    """

    _reads = ("timesteps", "betas", "alphas")
    _second = None
    _has_history = True
    betas: Tensor
    alphas: Tensor

    def _plan(self, start: int, *options: Any) -> Plan:
        """e = Σ w (σ x + α m) over up to four calls, x' = α' (x − σ e)/α + σ' e."""
        sigmas, alphas, times = self.betas.tolist()[start:], self.alphas.tolist()[start:], self._steps.times[start:]
        if len(sigmas) <= len(times):
            raise ValueError(f"trained_betas must have a number for each timestep and one more; got {len(self.betas)}")
        spans = [min(i, 3) for i in range(len(times))]
        rows = []
        for i, (reads, write) in enumerate(history(spans)):
            (here, there), sigma, weights = alphas[i : i + 2], sigmas[i], ADAMS_BASHFORTH[spans[i]]
            own = {"x": sigma, "m": here}
            share = there / max(here, 1e-8)
            average = blend((weights[0], own), *past(weights[1:]))
            x = blend((1.0, {"x": share}), (sigmas[i + 1] - share * sigma, average))
            slot = None if write is None else own
            rows.append(Row(t=times[i], alpha=here, sigma=sigma, x=x, slot=slot, reads=reads, write=write))
        return Plan(tuple(rows), name="ipndm")

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """x at the list's next level; arguments and results are diffusers'."""
        self._check_listed()
        index = self._index(timestep)
        return self._next(self._rows(index), index, model_output, sample, None, return_dict)
