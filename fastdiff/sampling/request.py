"""One call's arguments, each checked once: what ``sample`` and ``sample_iter`` hand to the stepper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_shape
from fastdiff.ops.backend import choose
from fastdiff.plan.plan import Plan
from fastdiff.samplers.resolve import Sampler, resolve_plan
from fastdiff.sampling.accelerated import is_batch_invariant
from fastdiff.sampling.belongs import warn_of_another
from fastdiff.sampling.classifier_guidance import Classifier, guided_by_gradient
from fastdiff.sampling.guidance import Guidance, Scale, resolve_guidance
from fastdiff.sampling.model import ModelInfo, check_model, inspect
from fastdiff.sampling.noise_source import NoiseSource, resolve_noise_source
from fastdiff.sampling.reuse import DeepCalls, check_reuse, deep_calls
from fastdiff.sampling.start import by_strength, check_start, initial_state, resolve_mask
from fastdiff.sampling.state import State
from fastdiff.sampling.thresholding import Thresholding, resolve_thresholding
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.spacing import Spacing


@dataclass(frozen=True)
class Request:
    """A run that can begin: its arguments are checked, and what they ask for is at hand.

    Attributes:
        network: the model, and what it takes.
        plan: the rows; ``start`` is the first one to run.
        x: the state before that row, float32 [B, …], the run's own.
        resume: the earlier run's state whose anchor and slots go on.
        noise, guidance, thresholding, classifier, mask, known: what ``sample``'s arguments of these names ask for.
        deep: how the network is asked for deep features, where the plan reuses them.
        backend: which kernels update the state.
        cuda_graph: "auto", True or False; with a callback, which wants every state, always False.
        return_log_prob: whether the log-densities of what rows draw are wanted.
        progress: whether to show a bar.
        callback: called with the state after every row.
    """

    network: ModelInfo
    plan: Plan
    start: int
    x: Tensor
    resume: State | None
    noise: NoiseSource
    guidance: Guidance
    thresholding: Thresholding | None
    classifier: Classifier | None
    mask: Tensor | None
    known: Tensor | None
    deep: DeepCalls | None
    backend: str
    cuda_graph: bool | str
    return_log_prob: bool
    progress: bool
    callback: Callable[[State], Any] | None

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        shape: Sequence[int],
        *,
        sampler: Sampler,
        steps: int | None,
        schedule: Schedule | str | None,
        prediction: str | None,
        variance: str | None,
        spacing: str | Spacing | None,
        eta: float | None,
        clip: float | None,
        sampler_options: Mapping[str, Any] | None,
        seed: int | None,
        seeds: Sequence[int] | None,
        sample_offset: int | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        noise_fn: Callable[[int, int, tuple[int, ...]], Tensor] | None,
        x_T: Tensor | None,
        x_init: Tensor | None,
        start_step: int,
        resume: State | None,
        strength: float | None,
        mask: Tensor | None,
        known: Tensor | None,
        model_kwargs: Mapping[str, Any] | None,
        uncond_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
        guidance_scale: Scale,
        guidance_rescale: float,
        guidance_interval: tuple[float, float] | None,
        thresholding: float | tuple[float, float] | None,
        cond_fn: Callable[..., Tensor] | None,
        device: torch.device | str | None,
        model_dtype: torch.dtype | None,
        backend: str,
        cuda_graph: bool | str,
        return_log_prob: bool,
        callback: Callable[[State], Any] | None,
        progress: bool,
    ) -> Request:
        """The request of ``sample``'s arguments; TypeError or ValueError names the one that is wrong.

        It is made among ``stepper.plain_tensors``, as the run is.
        """
        check_model(model)
        for name, function in (("callback", callback), ("cond_fn", cond_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable; got {type(function).__name__}")
        shape = check_shape("shape", shape)

        # The plan, and the row to begin at.
        plan = resolve_plan(sampler, steps, schedule, prediction, variance, spacing, eta, clip, sampler_options)
        check_start(plan, x_T, x_init, start_step, strength, resume)
        if strength is not None:

            def rebuilt(skip: int) -> Plan:
                options = {**(sampler_options or {}), "skip": skip}
                return resolve_plan(sampler, steps, schedule, prediction, variance, spacing, eta, clip, options)

            fixed = isinstance(sampler, Plan)
            if not fixed and ("skip" in (sampler_options or {}) or (isinstance(spacing, Spacing) and spacing.skip)):
                raise ValueError("strength leaves out the first steps; it goes without skip")
            plan, start_step = by_strength(plan, strength, None if fixed else steps, None if fixed else rebuilt)
        if cond_fn is not None and not plan.uses_gradient:
            plan = guided_by_gradient(plan)
        if cond_fn is None and plan.uses_gradient:
            raise ValueError(f"the plan {plan.name!r} reads a gradient: give cond_fn")
        if plan.learned_variance and (len(shape) < 2 or shape[1] == 0):
            raise ValueError(f"learned variance stands in a second half of the channels: shape {list(shape)} has none")

        # The network, and what goes into it and into the state.
        network = inspect(model, shape, device, model_dtype)
        if cond_fn is not None and is_batch_invariant(model):
            raise ValueError("cond_fn computes a whole batch at once, which a batch_invariant network does not go with")
        noise = resolve_noise_source(
            shape, network.device, network.dtype, seed, seeds, sample_offset, generator, noise_fn
        )
        guidance = resolve_guidance(
            plan, steps, shape[0], model_kwargs, uncond_kwargs, guidance_scale, guidance_rescale, guidance_interval
        )
        if plan.reused:
            check_reuse(plan, guidance)
        deep = deep_calls(model, plan.branch) if "deep" in plan.reused else None
        if plan.provenance is not None:
            told = 1.0 if uncond_kwargs is None else guidance_scale
            warn_of_another(plan.provenance, model, shape, told, stacklevel=4)
        if mask is not None or known is not None:
            mask, known = resolve_mask(mask, known, shape, network.device)
        if mask is not None and plan[-1].sigma > plan[0].sigma:
            raise ValueError(f"mask goes with a plan that leads to an image; {plan.name!r} leads to noise")
        threshold = None if thresholding is None else resolve_thresholding(thresholding, plan)
        plan.device_table(guidance.weights)  # refused here where float32 does not hold it

        # How to run it.
        check_graph(cuda_graph, network.device, noise, callback, cond_fn, return_log_prob)
        if not isinstance(backend, str):
            raise TypeError(f"backend must be a str; got {type(backend).__name__}")
        backend = choose(backend, network.device.type)
        start, x = initial_state(plan, shape, network.device, noise, x_T, x_init, start_step, resume, backend)
        if start < start_step:
            raise ValueError(f"resume stands at row {start}, before the first one of strength={strength}, {start_step}")
        if return_log_prob is not False:
            check_log_prob(return_log_prob, plan, start, mask, resume)
        return cls(
            network, plan, start, x, resume, noise, guidance, threshold,
            None if cond_fn is None else Classifier(cond_fn, guidance.plain), mask, known, deep, backend,
            cuda_graph if callback is None and not return_log_prob else False, return_log_prob, bool(progress),
            callback,
        )  # fmt: skip


def check_log_prob(wanted: object, plan: Plan, start: int, mask: Tensor | None, resume: State | None) -> None:
    """Raise where the log-densities of the rows from ``start`` on are not defined, or are not wanted by a bool."""
    if not isinstance(wanted, bool):
        raise TypeError(f"return_log_prob must be a bool; got {type(wanted).__name__}")
    if mask is not None:
        raise ValueError("return_log_prob goes without mask: of an inpainted x' a part is given, not drawn")
    if not any(row >= start for row in plan.noisy_rows):
        raise ValueError(
            f"return_log_prob needs a row that draws: the plan {plan.name!r} is deterministic from row {start} on, and "
            "an x' that follows from x has no density (ddim draws with eta > 0)"
        )
    for i, row in enumerate(plan):
        if row.uses("z") and not row.x.get("z"):
            raise ValueError(f"return_log_prob: row {i} of the plan {plan.name!r} draws noise into its history alone")
    if resume is not None and resume.log_prob is None:
        raise ValueError("resume has no log_prob: its run was not asked for it by return_log_prob=True")


def check_graph(
    cuda_graph: object,
    device: torch.device,
    noise: NoiseSource,
    callback: object,
    cond_fn: object,
    return_log_prob: object,
) -> None:
    """Raise ValueError for another ``cuda_graph`` than "auto", True or False, and for a True that cannot be kept."""
    if not isinstance(cuda_graph, bool) and not (isinstance(cuda_graph, str) and cuda_graph == "auto"):
        raise ValueError(f"cuda_graph must be 'auto', True or False; got {cuda_graph!r}")
    if cuda_graph is not True:
        return
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device; the model is on {device}")
    if not noise.from_stream or callback is not None or cond_fn is not None or return_log_prob:
        raise ValueError(
            "cuda_graph=True goes without generator, noise_fn, callback, cond_fn and return_log_prob, which run eagerly"
        )
