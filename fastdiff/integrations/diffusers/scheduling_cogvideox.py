"""CogVideoX's schedulers: DDIM, and DPM-Solver++(2M) SDE whose caller keeps the last x̂_0."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_ddim_cogvideox import DDIMSchedulerOutput as DDIMOutput
from diffusers.schedulers.scheduling_dpm_cogvideox import DDIMSchedulerOutput as DPMOutput
from torch import Tensor

from fastdiff.integrations.diffusers.scheduling_vp import TableStepping
from fastdiff.plan.plan import Plan
from fastdiff.samplers import ddim
from fastdiff.samplers.exponential import make_row
from fastdiff.schedules.spacing import levels


class CogVideoXDDIMScheduler(TableStepping, theirs.CogVideoXDDIMScheduler):
    """diffusers' CogVideoXDDIMScheduler, a step of which is one fused update (``samplers.ddim``).

    It differs as DDIMScheduler does: the previous timestep is the next entry of the list. clip_sample and eta do
    nothing, as in diffusers.
    """

    _output_class = DDIMOutput

    def _plan(self, start: int, *options: Any) -> Plan:
        (timestep,) = options
        final = float(self.final_alpha_cumprod)
        spacing = self._spacing(self._steps.times, final) if timestep is None else self._pair(timestep, final)
        return ddim(self._schedule(), prediction=self.config.prediction_type, spacing=spacing)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x at the list's next timestep; arguments and results are diffusers', of which eta … do nothing there too."""
        index, listed = self._place_or_pair(timestep)
        x, x0 = self._advance(self._rows(index, listed), index, model_output, sample)
        return self._results(return_dict, x, x0)


class CogVideoXDPMScheduler(TableStepping, theirs.CogVideoXDPMScheduler):
    """diffusers' CogVideoXDPMScheduler, a step of which is one fused update (``samplers.dpmpp_2m_sde``'s numbers).

    It differs as DDIMScheduler does: the previous timestep is the next entry of the list. ``timestep`` must be in the
    list and ``timestep_back`` be the entry before it. clip_sample and eta do nothing, as in diffusers.
    """

    _output_class = DPMOutput
    _has_history = True
    _returned: tuple[Tensor, int] | None = None  # the last x̂_0, which a slot holds too, and its version

    def _plan(self, start: int, *options: Any) -> Plan:
        """x' = (σ'/σ) e^−h x + α' (1 − e^−2h) d + σ' √(1 − e^−2h) z, d = x̂_0 + (h/2h_last)(x̂_0 − the last x̂_0)."""
        times, final = self._steps.times[start:], float(self.final_alpha_cumprod)
        stops = levels(self._schedule(), spacing=self._spacing(times, final))
        rows = []
        for i, (here, there) in enumerate(pairwise(stops)):
            h = there.log_snr - here.log_snr
            share = 0.0 if i in (0, len(times) - 1) else h / (2 * (here.log_snr - stops[i - 1].log_snr))
            gain = -math.expm1(-2 * h) * there.alpha
            x = {"x": there.sigma / here.sigma * math.exp(-h), "x0": gain * (1 + share), "slot0": -gain * share}
            x["z"] = there.sigma * math.sqrt(-math.expm1(-2 * h))
            reads, write = ((0,) if share else ()), (0 if i < len(times) - 2 else None)
            rows.append(
                make_row(here, self.config.prediction_type, math.inf, x, slot={"x0": 1.0}, reads=reads, write=write)
            )
        return Plan(tuple(rows), name="cogvideox_dpm")

    def _first_step(self, model_output: Tensor, sample: Tensor) -> None:
        self.step(model_output, None, self.timesteps[0], None, sample)

    def step(
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: Any,
        timestep_back: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
    ) -> Any:
        """x at the list's next timestep and x̂_0; arguments and results are diffusers', of which eta … do nothing."""
        self._check_listed()
        steps, old = self._list(), old_pred_original_sample
        value = self._value(timestep)
        index = steps.places[value] if value in steps.places else self._missing(value, steps.times)
        if old is None:
            steps.start = index
        else:
            self._take(old, timestep_back, index)
        rows = self._rows(index)
        second_order = old is not None and index < len(steps.times) - 1
        for _ in range(1 + second_order):  # diffusers draws anew for its second order
            noise = self._draw(generator, sample, sample.dtype)
        x, x0 = self._advance(rows, index, model_output, sample, noise)
        assert x0 is not None
        self._returned = None if x0.is_inference() else (x0, x0._version)
        # diffusers' first-order steps return a tuple whatever is asked.
        return self._results(return_dict and second_order, x, x0)

    def _take(self, old: Tensor, timestep_back: Any, index: int) -> None:
        """Go on with the x̂_0 that the caller kept: as a rule what the last step returned, which stands in its slot."""
        steps = self._steps
        back = None if timestep_back is None else self._value(timestep_back)
        if index == 0 or back != steps.times[index - 1]:
            raise ValueError(
                f"timestep_back must be the entry of scheduler.timesteps before timestep; got {back} before "
                f"{steps.times[index]}"
            )
        going_on = steps.start is not None and steps.start < index
        if not going_on:
            steps.start = index - 1
        known = self._returned
        if not going_on or known is None or known[0] is not old or known[1] != old._version:
            steps.state[0] = old.to(torch.promote_types(old.dtype, torch.float32), copy=True).contiguous()
            steps.unbind()
