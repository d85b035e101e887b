"""Schedulers that walk a list of σ: k-diffusion's, EDM's (x = x_0 + σ ε) and flow matching's ((1 − σ) x_0 + σ ε)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.base_sigmas import EDMStepping, FlowStepping, Pairs, ScaledStepping
from fastdiff.plan.plan import Plan, Row
from fastdiff.samplers import euler, euler_ancestral, heun, lms
from fastdiff.samplers.stages import Churn
from fastdiff.schedules.level import x0_terms


class ChurningStepping(ScaledStepping):
    """Euler's method with EDM's churn as diffusers has it: the network is shown the state before the noise."""

    _may_stay = True
    _second_is_float32 = True
    _dtype_from = "output"

    # Each has its own: _x0_terms(σ, σ̂) are (p, q) of x̂_0 = p x̂ + q m, the network having been shown σ.
    _x0_terms: Callable[[float, float], tuple[float, float]]

    def _churned(self, plan: Plan, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> Plan:
        """The plan with the noise in its rows: x̂ = x + s_noise √(σ̂² − σ²) z, then Euler's step from σ̂.

        The anchor brings out x̂_0, into which the noise enters too.
        """
        Churn(s_churn, s_tmin, s_tmax, s_noise)  # checks them
        rows = []
        for i, row in enumerate(plan):
            high = row.sigma * (1 + self._gamma(row.sigma, s_churn, s_tmin, s_tmax))
            p, q = self._x0_terms(row.sigma, high)
            h = self._steps.sigmas[i + 1] / high - 1
            push = s_noise * math.sqrt(high**2 - row.sigma**2)
            keep = 1 + h - h * p
            x = {"x": keep, "m": -h * q, "z": keep * push}
            rows.append(replace(row, p=p, q=q, x=x, anchor={"x": p, "m": q, "z": p * push}))
        return Plan(tuple(rows), name=plan.name, init_sigma=plan.init_sigma)

    def _churning_step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, churn: tuple[float, ...], generator: Any,
        return_dict: bool, *options: Any,
    ) -> Any:  # fmt: skip
        self._check_timestep(timestep)
        self._check_scaled()
        index = self._index(timestep)
        noise = None
        if churn[0] > 0:
            rows = self._rows(index, churn, *options)
            if self._gamma(self._steps.sigmas[index], *churn[:3]) > 0:
                noise = self._draw(generator, model_output, model_output.dtype)
        else:
            rows = self._rows(index, None, *options)
        return self._next(rows, index, model_output, sample, noise, return_dict)


class EulerDiscreteScheduler(ChurningStepping, theirs.EulerDiscreteScheduler):
    """diffusers' EulerDiscreteScheduler, a step of which is one fused update (``samplers.euler``).

    It differs in this: half-precision samples are noised by ``add_noise`` in float32 (they are stepped so there too);
    lists in which σ rises by more than float32's rounding are refused, where theirs goes on.
    """

    _predictions = ("epsilon", "sample", "original_sample", "v_prediction")
    _output_class = EulerDiscreteSchedulerOutput

    @property
    def _prediction(self) -> str:
        return self.config.prediction_type.removeprefix("original_")

    def _plan(self, start: int, *options: Any) -> Plan:
        plan = euler(self._schedule(), prediction=self._prediction, spacing=self._spacing(0))
        return plan if options[0] is None else self._churned(plan, *options[0])

    def _x0_terms(self, sigma: float, high: float) -> tuple[float, float]:
        # v is read at σ, as in diffusers.
        level = self._schedule().as_ve().at(high if self._prediction == "epsilon" else sigma)
        return x0_terms(self._prediction, level)

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
        """x at the list's next σ; arguments and results are diffusers'."""
        churn = (s_churn, s_tmin, s_tmax, s_noise)
        return self._churning_step(model_output, timestep, sample, churn, generator, return_dict)


class EDMEulerScheduler(EDMStepping, ChurningStepping, theirs.EDMEulerScheduler):
    """diffusers' EDMEulerScheduler, a step of which is one fused update (``samplers.euler`` on an EDMSchedule).

    It differs as EulerDiscreteScheduler does.
    """

    _predictions = ("epsilon", "v_prediction")
    _output_class = EDMEulerSchedulerOutput

    def _plan(self, start: int, *options: Any) -> Plan:
        churn, prediction = options
        plan = euler(self._schedule(), prediction=prediction, spacing=self._spacing(0))
        if churn is not None and prediction == "sample":
            raise ValueError(
                "s_churn does not go with pred_original_sample, which would be of the state before the noise"
            )
        if churn is not None:
            return self._churned(plan, *churn)
        sign = self._sign if prediction == "edm" else 1
        return replace(plan, rows=tuple(replace(row, q=sign * row.q) for row in plan))

    @property
    def _sign(self) -> int:
        """diffusers' v is EDM's F with its sign changed."""
        return -1 if self.config.prediction_type == "v_prediction" else 1

    def _x0_terms(self, sigma: float, high: float) -> tuple[float, float]:
        p, q = x0_terms("edm", self._schedule().at(high))
        return p, self._sign * q

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
        pred_original_sample: Tensor | None = None,
    ) -> Any:
        """x at the list's next σ; arguments and results are diffusers'."""
        churn, prediction = (s_churn, s_tmin, s_tmax, s_noise), "edm"
        if pred_original_sample is not None:
            model_output, prediction = pred_original_sample.to(model_output.dtype), "sample"
        return self._churning_step(model_output, timestep, sample, churn, generator, return_dict, prediction)


class EulerAncestralDiscreteScheduler(ScaledStepping, theirs.EulerAncestralDiscreteScheduler):
    """diffusers' EulerAncestralDiscreteScheduler, a step of which is one fused update (``samplers.euler_ancestral``).

    It differs as EulerDiscreteScheduler does, and prediction_type "sample" is served too.
    """

    _output_class = EulerAncestralDiscreteSchedulerOutput
    _may_stay = True
    _second_is_float32 = True
    _dtype_from = "output"

    def _plan(self, start: int, *options: Any) -> Plan:
        return euler_ancestral(self._schedule(), prediction=self.config.prediction_type, spacing=self._spacing(0))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the list's next σ; arguments and results are diffusers'."""
        self._check_timestep(timestep)
        self._check_scaled()
        index = self._index(timestep)
        noise = self._draw(generator, model_output, model_output.dtype)
        return self._next(self._rows(index), index, model_output, sample, noise, return_dict)


class HeunDiscreteScheduler(Pairs, ScaledStepping, theirs.HeunDiscreteScheduler):
    """diffusers' HeunDiscreteScheduler, a step of which is one fused update (``samplers.heun``).

    It differs in this: half-precision samples are stepped, and noised by ``add_noise``, in float32; lists in which σ
    rises by more than float32's rounding are refused.
    """

    _output_class = HeunDiscreteSchedulerOutput
    _may_stay = True
    is_scale_input_called = True  # here diffusers does not ask

    def _plan(self, start: int, *options: Any) -> Plan:
        if start % 2:
            raise ValueError(f"a run begins with the first of a level's two steps, an even number; got step {start}")
        sigmas, times, config = self._steps.sigmas[start:], self._steps.times[start:], self.config
        plan = heun(
            self._schedule(), prediction=config.prediction_type,
            spacing=self._walk([sigmas[0], *sigmas[1::2]], [times[0], *times[1::2]]),
            clip=config.clip_sample_range if config.clip_sample else None,
        )  # fmt: skip
        if config.prediction_type != "epsilon" or config.clip_sample:
            return plan
        # (x − x̂_0)/σ is the network's output itself: no digits are lost in the difference.
        rows = tuple(
            replace(row, x=_with_output(row.x, row), anchor=row.anchor and _with_output(row.anchor, row))
            for row in plan
        )
        return replace(plan, rows=rows)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """x at the list's next σ, tried or mended; arguments and results are diffusers'."""
        index = self._index(timestep)
        return self._next(self._rows(index), index, model_output, sample, None, return_dict)


def _with_output(terms: Mapping[str, float], row: Row) -> dict[str, float]:
    """Coefficients in which x̂_0 is written out as x − σ m."""
    x0 = terms.get("x0", 0.0)
    both = {"x": terms.get("x", 0.0) + x0, "m": -x0 * row.sigma}
    return {**{name: value for name, value in terms.items() if name not in ("x", "x0")}, **both}


class LMSDiscreteScheduler(ScaledStepping, theirs.LMSDiscreteScheduler):
    """diffusers' LMSDiscreteScheduler, a step of which is one fused update (``samplers.lms``).

    It differs in this: coefficients are integrated exactly, theirs numerically to 1e-4; a run that begins in the
    middle of the list (image to image) starts at order 1, where theirs takes the coefficients of an order for which it
    has no outputs yet; half-precision samples are stepped, and noised by ``add_noise``, in float32; lists in which σ
    does not fall are refused. ``order`` must be in 1 … 4 and stay the same within a run.
    """

    _output_class = LMSDiscreteSchedulerOutput
    _has_history = True

    def _plan(self, start: int, *options: Any) -> Plan:
        return lms(
            self._schedule(), prediction=self.config.prediction_type, order=options[0], spacing=self._spacing(start)
        )

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> Any:
        """x at the list's next σ; arguments and results are diffusers'."""
        self._check_scaled()
        index = self._index(timestep)
        return self._next(self._rows(index, order), index, model_output, sample, None, return_dict)


class FlowMatchEulerDiscreteScheduler(FlowStepping, theirs.FlowMatchEulerDiscreteScheduler):
    """diffusers' FlowMatchEulerDiscreteScheduler, a step of which is one fused update.

    It differs in this: half-precision samples are noised by ``scale_noise`` in float32 (they are stepped so there
    too); with ``shift_terminal``, a list of one step stays at σ = 1, where theirs divides by 0. A step with
    ``per_token_timesteps`` is diffusers' own.
    """

    _output_class = FlowMatchEulerDiscreteSchedulerOutput
    _second = None
    _dtype_from = "output"

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """The list of σ stretched to end at ``shift_terminal``; one that does not leave σ = 1 cannot be."""
        return t if t[-1] == 1 else super().stretch_shift_to_terminal(t)

    def _plan(self, start: int, *options: Any) -> Plan:
        """x' = x + (σ' − σ) v, ``samplers.euler``'s numbers, for lists that rise (invert_sigmas) too; or, by
        stochastic_sampling, x̂_0 noised anew: (1 − σ') x̂_0 + σ' z."""
        sigmas, rows = self._steps.sigmas, []
        for t, sigma, following in zip(self._steps.times, sigmas, sigmas[1:], strict=False):
            x = {"x": 1.0, "m": following - sigma}
            if self.config.stochastic_sampling:
                x = {"x0": 1 - following, "z": following}
            rows.append(Row(t=t, alpha=1 - sigma, sigma=sigma, p=1.0, q=-sigma, x=x))
        return Plan(tuple(rows), name="flow_euler")

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x at the list's next σ; arguments and results are diffusers', where s_churn … s_noise do nothing either."""
        if per_token_timesteps is not None:
            if self.config.stochastic_sampling and self._steps.key is not None:
                raise ValueError("per_token_timesteps with stochastic_sampling take torch's noise, not fastdiff's own")
            return theirs.FlowMatchEulerDiscreteScheduler.step(
                self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                per_token_timesteps, return_dict,
            )  # fmt: skip
        self._check_timestep(timestep)
        index, noise = self._index(timestep), None
        if self.config.stochastic_sampling:
            noise = self._draw(generator, sample, torch.float32)
        return self._next(self._rows(index), index, model_output, sample, noise, return_dict)
