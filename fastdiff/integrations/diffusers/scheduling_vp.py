"""Schedulers that walk the table of ᾱ: x = √ᾱ x_0 + √(1 − ᾱ) ε.

A prediction of ε where ᾱ is 0 (rescale_betas_zero_snr), which says nothing of x_0, is refused; theirs divide by 0. So
are lists in which a timestep stands twice.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput as DDIMInverseSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from fastdiff.checks import DTYPES
from fastdiff.integrations.diffusers.base import Stepping, last_apart, mix
from fastdiff.ops import add_noise
from fastdiff.plan.plan import Plan, Row
from fastdiff.samplers import ddim, ddim_inverse, ddpm, pndm
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.spacing import Spacing


class TableStepping(Stepping):
    """What they share: the schedule, and noising by it."""

    _reads: ClassVar[tuple[str, ...]] = ("timesteps", "alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod")

    def _schedule(self) -> NoiseSchedule:
        schedule = super()._schedule()
        assert isinstance(schedule, NoiseSchedule)
        return schedule

    @property
    def _clip(self) -> float | None:
        if self._thresholds:
            return 1.0  # a bound of each sample takes its place
        return self.config.clip_sample_range if self.config.get("clip_sample") else None

    def _spacing(self, times: list[float], final: float) -> Spacing:
        """The levels at these timesteps and the last one, whose ᾱ is ``final``."""
        schedule = self._schedule()
        if final == 1:
            return Spacing(timesteps=times)
        if times[-1] > 0:
            return Spacing(timesteps=times, final="sigma_min")
        sigmas = [schedule.sigma_at(t) for t in times]
        return Spacing(timesteps=times, sigmas=last_apart([*sigmas, schedule.sigma_min]))

    def _place_or_pair(self, timestep: Any) -> tuple[int, float | None]:
        """The step's number in the list and None; or 0 and the timestep where that is not in the list."""
        self._check_listed()
        steps = self._list()
        value = self._value(timestep)
        index = steps.places.get(value)
        return (0, value) if index is None else (index, None)

    def _pair(self, timestep: float, final: float) -> Spacing:
        """The two levels of a timestep that is not in the list: diffusers' previous one is T // steps below."""
        assert self.num_inference_steps is not None
        previous = timestep - self.config.num_train_timesteps // self.num_inference_steps
        schedule = self._schedule()
        sigma = math.sqrt((1 - final) / final) if previous < 0 else schedule.sigma_at(previous)
        return Spacing(sigmas=last_apart([schedule.sigma_at(timestep), sigma]))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ x_0 + √(1 − ᾱ) ε at each sample's timestep, computed in float32 whatever the samples' dtype.

        Raises TypeError where timesteps are no integers.
        """
        x, t = original_samples, whole(timesteps).to(original_samples.device, torch.int64)
        plain = x.dtype in DTYPES and noise.dtype == x.dtype and noise.shape == x.shape and noise.device == x.device
        if plain and t.shape == x.shape[:1]:
            return add_noise(x, t, self._schedule(), noise=noise)[0]
        alpha, sigma = self._levels_at(t, x)
        return mix(alpha, x, sigma, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ ε − √(1 − ᾱ) x_0 at each sample's timestep, computed in float32 whatever the samples' dtype."""
        alpha, sigma = self._levels_at(whole(timesteps).to(sample.device, torch.int64), sample)
        return mix(-sigma, sample, alpha, noise)

    def _levels_at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        schedule, shape = self._schedule(), (-1, *[1] * (like.ndim - 1))
        alpha, sigma = (
            table.to(like.device, wide)[t.flatten()].view(shape) for table in (schedule.alphas, schedule.sigmas)
        )
        return alpha, sigma


def whole(timesteps: Tensor) -> Tensor:
    """Timesteps that count into a table: those of a floating-point dtype may have been rounded to others."""
    if timesteps.is_floating_point() or timesteps.dtype == torch.bool:
        raise TypeError(f"timesteps must be integers, which count into the table of ᾱ; got {timesteps.dtype}")
    return timesteps


class DDPMScheduler(TableStepping, theirs.DDPMScheduler):
    """diffusers' DDPMScheduler, a step of which is one fused update (``samplers.ddpm``).

    It differs in this: no noise is added in the list's last step (Ho et al. 2020, Algorithm 2), though theirs adds some
    there under variance_type "fixed_large" and "learned_range" where the last timestep is not 0 (the generator is drawn
    from all the same); half-precision samples are stepped, and noised by ``add_noise``, in float32. variance_type
    "learned" and "fixed_large_log" are refused: theirs take roots of what is negative, the network's output and a
    logarithm.
    """

    _output_class = DDPMSchedulerOutput

    # None is in configs of other schedulers, from which this one may be made.
    _variances: ClassVar = {
        None: "fixed_small",
        "fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large",
        "learned_range": "learned_range",
    }  # fmt: skip

    def _check_config(self) -> None:
        super()._check_config()
        if self.config.variance_type not in self._variances:
            known = ", ".join(filter(None, self._variances))
            roots = {"learned": "the network's output", "fixed_large_log": "a logarithm"}
            root = roots.get(self.config.variance_type)
            why = "is not served" if root is None else f"is the square root of {root}, NaN where that is negative"
            self._refuse("variance_type", f"{why}; take one of {known}")

    def _plan(self, start: int, *options: Any) -> Plan:
        return ddpm(
            self._schedule(), spacing=Spacing(timesteps=self._steps.times), prediction=self.config.prediction_type,
            clip=self._clip, variance=self._variances[self.config.variance_type],
        )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the list's next timestep; arguments and results are diffusers'."""
        steps = self._list()
        value = self._value(timestep)
        index = steps.places[value] if value in steps.places else self._missing(value, steps.times)
        rows, noise = self._rows(index), None
        if value > 0:
            noise = self._draw(generator, sample, model_output.dtype)
        x, x0 = self._advance(rows, index, model_output, sample, noise)
        return self._results(return_dict, x, x0)


class DDIMScheduler(TableStepping, theirs.DDIMScheduler):
    """diffusers' DDIMScheduler, a step of which is one fused update (``samplers.ddim``).

    It differs in this: the previous timestep is the next entry of the list. Theirs is timestep − T // steps, another
    one under timestep_spacing "trailing" or "linspace" for nearly every number of steps. (A timestep that is not in
    the list is stepped as theirs.) Half-precision samples are stepped, and noised by ``add_noise``, in float32.
    ``eta`` must be in [0, 1].
    """

    _output_class = DDIMSchedulerOutput

    def _plan(self, start: int, *options: Any) -> Plan:
        timestep, eta, use_clipped = options
        final = float(self.final_alpha_cumprod)
        spacing = self._spacing(self._steps.times, final) if timestep is None else self._pair(timestep, final)
        return ddim(
            self._schedule(), prediction=self.config.prediction_type, clip=self._clip, eta=eta,
            use_clipped_model_output=use_clipped, spacing=spacing,
        )  # fmt: skip

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
        """x at the list's next timestep; arguments and results are diffusers'."""
        index, listed = self._place_or_pair(timestep)
        rows = self._rows(index, listed, eta, use_clipped_model_output)
        if eta > 0:
            if variance_noise is None:
                variance_noise = self._draw(generator, model_output, model_output.dtype)
            elif generator is not None:
                raise ValueError("give generator or variance_noise, not both")
        x, x0 = self._advance(rows, index, model_output, sample, variance_noise)
        return self._results(return_dict, x, x0)


class DDIMInverseScheduler(TableStepping, theirs.DDIMInverseScheduler):
    """diffusers' DDIMInverseScheduler, a step of which is one fused update (``samplers.ddim_inverse``).

    It differs as DDIMScheduler does: the level that a step leaves is the entry of the list before it. prediction_type
    "sample" needs set_alpha_to_one=False: it says nothing of the noise of a clean image, where theirs divides by 0.
    """

    _output_class = DDIMInverseSchedulerOutput

    initial_alpha_cumprod: Tensor

    def _plan(self, start: int, *options: Any) -> Plan:
        (timestep,) = options
        initial = float(self.initial_alpha_cumprod)
        if initial == 1 and timestep is None and self.config.prediction_type == "sample":
            self._refuse(
                "prediction_type",
                "cannot leave the clean image, of whose noise it says nothing; set_alpha_to_one=False can",
            )
        spacing = self._spacing(self._steps.times[::-1], initial) if timestep is None else self._pair(timestep, initial)
        return ddim_inverse(self._schedule(), prediction=self.config.prediction_type, clip=self._clip, spacing=spacing)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """x at this timestep, from the one before it; arguments and results are diffusers'."""
        index, listed = self._place_or_pair(timestep)
        x, x0 = self._advance(self._rows(index, listed), index, model_output, sample)
        return self._results(return_dict, x, x0)


class PNDMScheduler(TableStepping, theirs.PNDMScheduler):
    """diffusers' PNDMScheduler, a step of which is one fused update (``samplers.pndm``).

    It differs in this: the previous timestep is the next entry of the list, where theirs is timestep − T // steps. A
    run that begins in the middle of the list (image to image) starts as a multistep method does; theirs mends its
    first step, as at the list's head, but has no second call at that level, and walks one level behind from there on.
    Half-precision samples are stepped, and noised by ``add_noise``, in float32. What was assigned to ``ets`` is not
    read.
    """

    _second = None
    _predictions = ("epsilon", "v_prediction")
    _has_history = True
    _timesteps: Any
    plms_timesteps: Any
    counter: int

    def _mend_list(self) -> None:
        super()._mend_list()
        if self.config.timestep_spacing == "trailing":
            self._timesteps = self._timesteps[self._timesteps != -1]
            self.plms_timesteps = self.plms_timesteps[self.plms_timesteps != -1]

    def _levels(self) -> list[float]:
        """The list without the calls that its start adds."""
        return [float(t) for t in self._timesteps[::-1]]

    def _plan(self, start: int, *options: Any) -> Plan:
        skip, levels = self.config.skip_prk_steps, self._levels()
        if start and not skip:
            raise ValueError("with skip_prk_steps=False a run must begin at the first timestep")
        first = max(start - 1, 0)  # the second and the third entry are one level
        plan = pndm(
            self._schedule(), prediction=self.config.prediction_type, skip_prk_steps=skip, averages="output",
            spacing=self._spacing(levels[first:], float(self.final_alpha_cumprod)),
        )  # fmt: skip
        if not start:
            return plan
        rows = plan.rows[:1] + plan.rows[2:]
        if start == 1:  # the first of two calls at one level
            rows = (Row(t=rows[0].t, alpha=rows[0].alpha, sigma=rows[0].sigma, x={"x": 1.0}), *rows)
        return Plan(rows, name=plan.name)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """x at the list's next timestep; arguments and results are diffusers'."""
        self._check_listed()
        steps = self._list()
        if steps.start is None:
            place = self._place(timestep)
            steps.start = self.index_for_timestep(timestep) if place is None else place
        index = steps.start + self.counter
        x, _ = self._advance(self._rows(index), index, model_output, sample)
        self.counter += 1
        return self._results(return_dict, x)

    def step_prk(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """The same as ``step``, which knows whether it is in the Runge–Kutta start."""
        return self.step(model_output, timestep, sample, return_dict)

    def step_plms(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """The same as ``step``, which knows whether it is in the Runge–Kutta start."""
        return self.step(model_output, timestep, sample, return_dict)
