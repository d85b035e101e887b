"""Schedulers that integrate exponentially over λ = ln(α/σ), with a history of past outputs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from fastdiff.integrations.diffusers.base_sigmas import SigmaStepping
from fastdiff.plan.plan import Plan
from fastdiff.samplers import deis, dpm_multistep, dpm_singlestep, unipc
from fastdiff.schedules.continuous import FlowSchedule
from fastdiff.schedules.level import Schedule


class SolverStepping(SigmaStepping):
    """What they share: the list of σ/α, or of a flow's σ, and the state's scale."""

    _second = None
    _predictions = ("epsilon", "sample", "v_prediction", "flow_prediction")
    _has_history = True
    # Options whose list diffusers takes in the place of a flow's.
    _beside_flow: ClassVar[tuple[str, ...]] = (
        "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    )  # fmt: skip

    def _check_config(self) -> None:
        super()._check_config()
        config = self.config
        if config.get("solver_order", 1) not in (1, 2, 3):
            self._refuse("solver_order", "must be 1, 2 or 3")
        if config.prediction_type == "flow_prediction" and not config.use_flow_sigmas:
            self._refuse("prediction_type", "needs use_flow_sigmas=True")
        if config.prediction_type == "v_prediction" and config.use_flow_sigmas:
            self._refuse("prediction_type", "does not go with use_flow_sigmas=True")
        if config.use_flow_sigmas:
            for option in self._beside_flow:
                if config.get(option):
                    self._refuse(option, "does not go with use_flow_sigmas=True: its σ go beyond a flow's, 1")

    def _schedule(self) -> Schedule:
        return FlowSchedule(T=self.config.num_train_timesteps) if self.config.use_flow_sigmas else super()._schedule()

    def _alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.use_flow_sigmas:
            return 1 - sigma, sigma
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha, sigma * alpha

    def _options(self, start: int) -> dict[str, Any]:
        """What every solver's plan takes."""
        return {
            "prediction": self.config.prediction_type,
            "clip": 1.0 if self._thresholds else None,  # a bound of each sample takes its place
            "order": self.config.solver_order,
            "spacing": self._spacing(start),
        }

    def _missing(self, value: float, times: list[float]) -> int:
        return len(times) - 1  # as diffusers

    def _solve(
        self, model_output: Tensor, timestep: Any, sample: Tensor, noise: Tensor | None, return_dict: bool
    ) -> Any:
        index = self._index(timestep)
        return self._next(self._rows(index), index, model_output, sample, noise, return_dict)

    def _output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The half of a network's output that is not its variance."""
        self._check_listed()
        if self.config.get("variance_type") in ("learned", "learned_range"):
            return model_output[:, : sample.shape[1]]
        return model_output


class DPMSolverMultistepScheduler(SolverStepping, theirs.DPMSolverMultistepScheduler):
    """diffusers' DPMSolverMultistepScheduler, a step of which is one fused update (``samplers.dpm_multistep``).

    It differs in this: coefficients are float64, from theirs in the last digits; but at order 3 under "sde-dpmsolver++"
    (of DPMSolverSinglestepScheduler with solver_type "heun") theirs gives the second difference −½ where its integral
    has +½ (huggingface/diffusers#9104), and ours the published weight. Half-precision samples are stepped, and noised
    by ``add_noise``, in float32; of a learned variance's outputs the first half is taken, not the first three channels.
    Lists in which σ does not fall are refused, but that the last two may be the same but for rounding, and so are
    use_flow_sigmas beside Karras, exponential, beta or Lu's σ, which go beyond a flow's. What was assigned to
    ``model_outputs`` is not read.
    """

    def _plan(self, start: int, *options: Any) -> Plan:
        config = self.config
        return dpm_multistep(
            self._schedule(), algorithm=config.algorithm_type.removeprefix("sde-"), solver_type=config.solver_type,
            lower_order_final=config.lower_order_final and len(self._steps.times) < 15,
            euler_at_final=config.euler_at_final, eta=float(config.algorithm_type.startswith("sde-")),
            **self._options(start),
        )  # fmt: skip

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
        model_output, noise = self._output(model_output, sample), None
        if self.config.algorithm_type.startswith("sde-"):
            noise = variance_noise
            if noise is None:
                noise = self._draw(generator, model_output, torch.float32)
        return self._solve(model_output, timestep, sample, noise, return_dict)


class DPMSolverSinglestepScheduler(SolverStepping, theirs.DPMSolverSinglestepScheduler):
    """diffusers' DPMSolverSinglestepScheduler, a step of which is one fused update (``samplers.dpm_singlestep``).

    It differs as DPMSolverMultistepScheduler does.
    """

    order_list: list[int]

    def _plan(self, start: int, *options: Any) -> Plan:
        config = self.config
        # A run that begins within a step of several calls begins with what is left of it.
        sizes: list[int] = []
        for i, order in enumerate(self.order_list[start : len(self._steps.times)]):
            if order == 1 or i == 0:
                sizes.append(1)
            else:
                sizes[-1] += 1
        return dpm_singlestep(
            self._schedule(), algorithm=config.algorithm_type.removeprefix("sde-"), solver_type=config.solver_type,
            sizes=sizes, eta=float(config.algorithm_type.startswith("sde-")), **self._options(start),
        )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """x at the list's next level; arguments and results are diffusers'."""
        model_output, noise = self._output(model_output, sample), None
        if self.config.algorithm_type.startswith("sde-"):
            dtype = torch.promote_types(sample.dtype, model_output.dtype)
            noise = self._draw(generator, model_output, dtype)
        return self._solve(model_output, timestep, sample, noise, return_dict)


class DEISMultistepScheduler(SolverStepping, theirs.DEISMultistepScheduler):
    """diffusers' DEISMultistepScheduler, a step of which is one fused update (``samplers.deis``).

    It differs as DPMSolverMultistepScheduler does, and in this: where diffusers' list ends with one σ twice (flow,
    Karras, exponential and beta σ), ours ends at 0. Theirs makes its last network call for a step of length 0, and
    leaves σ of noise in the picture, which diffusers has mended in DPMSolverMultistepScheduler alone.
    """

    def _mend_list(self) -> None:
        super()._mend_list()
        if len(self.sigmas) > 1 and self.sigmas[-1] == self.sigmas[-2]:
            self.sigmas[-1] = 0.0

    def _plan(self, start: int, *options: Any) -> Plan:
        lower = self.config.lower_order_final and len(self._steps.times) < 15
        return deis(self._schedule(), lower_order_final=lower, **self._options(start))

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """x at the list's next level; arguments and results are diffusers'."""
        return self._solve(self._output(model_output, sample), timestep, sample, None, return_dict)


class UniPCMultistepScheduler(SolverStepping, theirs.UniPCMultistepScheduler):
    """diffusers' UniPCMultistepScheduler, a step of which is one fused update (``samplers.unipc``).

    It differs as DPMSolverMultistepScheduler does; and with ``shift_terminal``, a list of one step stays at σ = 1,
    where theirs divides by 0. A run that ends at σ = 0 is finite under solver_type "bh1" and without
    lower_order_final, too. use_karras_sigmas goes with use_flow_sigmas. With another scheduler as predictor
    (``solver_p``) the steps are diffusers' own.
    """

    _beside_flow = ("use_exponential_sigmas", "use_beta_sigmas")
    _dtype_from = "sample"
    disable_corrector: list[int]

    def _check_config(self) -> None:
        super()._check_config()
        if not isinstance(self.config.solver_p, SchedulerMixin | None):
            self._refuse("solver_p", "must be another scheduler")
        self._thresholds = self._thresholds and self.config.predict_x0  # as diffusers

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """The list of σ stretched to end at ``shift_terminal``; one that does not leave σ = 1 cannot be."""
        return t if t[-1] == 1 else super().stretch_shift_to_terminal(t)

    def _plan(self, start: int, *options: Any) -> Plan:
        config = self.config
        return unipc(
            self._schedule(), solver_type=config.solver_type, predict_x0=config.predict_x0,
            lower_order_final=config.lower_order_final,
            disable_corrector=[i - start for i in self.disable_corrector if i >= start], **self._options(start),
        )  # fmt: skip

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """x at the list's next level; arguments and results are diffusers'."""
        if self.config.solver_p is not None:
            return theirs.UniPCMultistepScheduler.step(self, model_output, timestep, sample, return_dict)
        return self._solve(self._output(model_output, sample), timestep, sample, None, return_dict)
