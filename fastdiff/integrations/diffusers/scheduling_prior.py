"""Ancestral schedulers of image priors: unCLIP's, as in Kandinsky, and Würstchen's, as in Stable Cascade."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenSchedulerOutput
from diffusers.schedulers.scheduling_unclip import UnCLIPSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.base import Stepping, mix
from fastdiff.integrations.diffusers.scheduling_vp import TableStepping
from fastdiff.plan.plan import Plan, Row
from fastdiff.schedules.level import Level, x0_terms


class UnCLIPScheduler(TableStepping, theirs.UnCLIPScheduler):
    """diffusers' UnCLIPScheduler, a step of which is one fused update: a draw from the posterior of ``samplers.ddpm``.

    β is diffusers' float32 number, and of adjacent timesteps the table's entry. It differs in this: half-precision
    samples are stepped, and noised by ``add_noise``, in float32.
    """

    _output_class = UnCLIPSchedulerOutput
    _reads = ("timesteps", "alphas_cumprod", "betas")
    _predictions = ("epsilon", "sample")
    betas: Tensor

    def _plan(self, start: int, *options: Any) -> Plan:
        """The list's steps, each to the timestep before its own or to its next; or, of one step, to a third."""
        times, timestep, previous = self._steps.times, *options
        table, betas = self.alphas_cumprod.tolist(), self.betas.tolist()
        if timestep is not None:  # any pair: as often as draws are numbered
            return self._made([self._row(int(timestep), int(previous), table, betas)] * len(times))
        pairs = zip(times, [*times[1:], -1] if previous == "next" else [t - 1 for t in times], strict=True)
        return self._made([self._row(int(t), int(p), table, betas) for t, p in pairs])

    def _made(self, rows: list[Row]) -> Plan:
        return Plan(tuple(rows), name="unclip", learned_variance=self.config.variance_type == "learned_range")

    def _row(self, t: int, previous: int, table: list[float], betas: list[float]) -> Row:
        """x' = √ᾱ' β/(1 − ᾱ) x̂_0 + √(1 − β) (1 − ᾱ')/(1 − ᾱ) x + √β̃ z (Ho et al. 2020, Equation 7)."""
        bar, after = table[t], table[previous] if previous >= 0 else 1.0
        beta = betas[t] if previous == t - 1 else 1 - bar / after
        variance = (1 - after) / (1 - bar) * beta
        x = {
            "x0": math.sqrt(after) * beta / (1 - bar),
            "x": math.sqrt(1 - beta) * (1 - after) / (1 - bar),
        }
        logs = None
        if t > 0 and self.config.variance_type == "fixed_small_log":
            x["z"] = math.sqrt(max(variance, 1e-20))
        elif t > 0 and variance > 0:
            x["z"], logs = 1.0, (math.log(variance), math.log(beta))
        level = Level(float(t), math.sqrt(bar), math.sqrt(1 - bar))
        p, q = x0_terms(self.config.prediction_type, level)
        clip = self._clip or math.inf
        return Row(t=t, alpha=level.alpha, sigma=level.sigma, p=p, q=q, clip=clip, x=x, log_variance=logs)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        prev_timestep: Any = None,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """x at ``prev_timestep``, or at the timestep before this one; arguments and results are diffusers'."""
        steps, value = self._list(), self._value(timestep)
        previous = value - 1 if prev_timestep is None else self._value(prev_timestep)
        index = steps.places.get(value, 0)
        following = steps.times[index + 1] if index + 1 < len(steps.times) else -1
        if value not in steps.places:
            rows = self._rows(index, value, previous)
        elif previous == following:
            rows = self._rows(index, None, "next")
        else:
            rows = self._rows(index, *((None, "adjacent") if previous == value - 1 else (value, previous)))
        noise = None
        if value > 0:
            noise = self._draw(generator, sample, model_output.dtype)
        x, x0 = self._advance(rows, index, model_output, sample, noise)
        return self._results(return_dict, x, x0)


class DDPMWuerstchenScheduler(Stepping, theirs.DDPMWuerstchenScheduler):
    """diffusers' DDPMWuerstchenScheduler, a step of which is one fused update: ``samplers.ddpm``'s on a cosine of t.

    It differs in this: half-precision samples are stepped, and noised by ``add_noise``, in float32. All samples have
    one timestep. It is told as a copy, rounded to the network's dtype, and takes part in the numbers: reading it waits
    for the device, as theirs does.
    """

    _output_class = DDPMWuerstchenSchedulerOutput
    _second = None
    _dtype_from = "output"
    _alpha_cumprod: Callable[[Tensor, torch.device], Tensor]

    def _first_step(self, model_output: Tensor, sample: Tensor) -> None:
        self.step(model_output, self.timesteps[:1], sample)

    def _bars(self, times: list[float]) -> list[float]:
        """diffusers' ᾱ at these t, float32 numbers."""
        return self._alpha_cumprod(torch.tensor(times), torch.device("cpu")).tolist()

    def _plan(self, start: int, *options: Any) -> Plan:
        (timestep, index), times = options, self._steps.times
        if timestep is not None:  # between two entries: as often as draws are numbered
            row = self._row(timestep, times[index + 1], *self._bars([timestep, times[index + 1]]))
            return Plan((row,) * (len(times) - 1), name="wuerstchen")
        bars = self._bars(times)
        rows = (self._row(*pair) for pair in zip(times, times[1:], bars, bars[1:], strict=False))
        return Plan(tuple(rows), name="wuerstchen")

    def _row(self, t: float, following: float, bar: float, after: float) -> Row:
        """x' = (x − (1 − α) ε/√(1 − ᾱ))/√α + √((1 − α)(1 − ᾱ')/(1 − ᾱ)) z, α = ᾱ/ᾱ' (Ho et al. 2020, Algorithm 2)."""
        if following > t:
            raise ValueError(f"timesteps must fall from 1 to 0; got {following:g} after {t:g}")
        alpha = bar / after
        keep = 1 / math.sqrt(alpha)
        x = {"x": keep, "m": -keep * (1 - alpha) / math.sqrt(1 - bar)}
        if following != 0:
            x["z"] = math.sqrt((1 - alpha) * (1 - after) / (1 - bar))
        level = Level(t, math.sqrt(bar), math.sqrt(1 - bar))
        p, q = x0_terms("epsilon", level)
        return Row(t=t, alpha=level.alpha, sigma=level.sigma, p=p, q=q, x=x)

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the list's next t after the one nearest to ``timestep``, [B]; arguments and results are diffusers'."""
        times, value = self._list().times, self._value(timestep)
        index = min(range(len(times)), key=lambda i: abs(times[i] - value))
        if index == len(times) - 1:
            raise IndexError(f"there is no step after the list's last timestep {times[-1]}; got {value}")
        rows = self._rows(index, *((None, None) if times[index] == value else (value, index)))
        noise = self._draw(generator, sample, model_output.dtype)
        x, _ = self._advance(rows, index, model_output, sample, noise)
        x = x.to(model_output.dtype)
        return self._results(return_dict, x)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ x_0 + √(1 − ᾱ) ε at each sample's t, in float32 whatever the samples' dtype."""
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        bar = self._alpha_cumprod(timesteps.to(original_samples.device), original_samples.device).to(wide)
        bar = bar.view(-1, *[1] * (original_samples.ndim - 1))
        return mix(bar.sqrt(), original_samples, (1 - bar).sqrt(), noise)
