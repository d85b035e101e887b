"""guided-diffusion and improved-diffusion: their sampling loops as functions of the GaussianDiffusion object.

from fastdiff.integrations import guided_diffusion
images = guided_diffusion.p_sample_loop(diffusion, model, (16, 3, 64, 64), model_kwargs={"y": classes})

Each takes the arguments of the method of its name after the diffusion, and further ones of ``fastdiff.sample`` (seed=,
generator=, backend=, …). Without a source of noise the numbers are torch.randn's, in the library's order. The model is
called as (x, t, **model_kwargs), in the mode that it is in, t as the library has it: respaced, rescaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.common import initial, run_from
from fastdiff.plan.plan import Plan
from fastdiff.samplers import ddim, ddpm
from fastdiff.sampling.sample import sample, sample_iter
from fastdiff.sampling.state import State
from fastdiff.schedules.discrete import NoiseSchedule

PREDICTIONS = {"EPSILON": "epsilon", "START_X": "sample"}
VARIANCES = {name.upper(): name for name in ("fixed_small", "fixed_large", "learned", "learned_range")}
ModelKwargs = Mapping[str, Any] | None
Function = Callable[..., Any] | None


def p_sample_loop(
    diffusion: Any, model: Callable[..., Any], shape: Sequence[int], noise: Tensor | None = None,
    clip_denoised: bool = True, denoised_fn: Function = None, cond_fn: Function = None,
    model_kwargs: ModelKwargs = None, device: Any = None, progress: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """DDPM over the diffusion's timesteps.

    Args:
        diffusion: a GaussianDiffusion or SpacedDiffusion that predicts ε or x_0, with any variance.
        noise: x_T. clip_denoised: clamp x̂_0 to ±1, after denoised_fn(x̂_0).
        cond_fn: cond_fn(x, t, **model_kwargs) -> ∇ log p(y | x_t): it moves the mean by the variance times that.
        device: noise's or the model's by default.

    Returns:
        float32, of this shape.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    return sample(**_run(dict(locals()))[0])


def p_sample_loop_progressive(
    diffusion: Any, model: Callable[..., Any], shape: Sequence[int], noise: Tensor | None = None,
    clip_denoised: bool = True, denoised_fn: Function = None, cond_fn: Function = None,
    model_kwargs: ModelKwargs = None, device: Any = None, progress: bool = False, **options: Any,
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """``p_sample_loop``, yielding {"sample": x, "pred_xstart": x̂_0} after every step."""
    return _dicts(*_run(dict(locals())))


def ddim_sample_loop(
    diffusion: Any, model: Callable[..., Any], shape: Sequence[int], noise: Tensor | None = None,
    clip_denoised: bool = True, denoised_fn: Function = None, cond_fn: Function = None,
    model_kwargs: ModelKwargs = None, device: Any = None, progress: bool = False, eta: float = 0.0, **options: Any,
) -> Tensor:  # fmt: skip
    """``p_sample_loop`` by DDIM, ε from the clipped x̂_0; cond_fn moves that ε by −√(1 − ᾱ) times the gradient."""
    return sample(**_run(dict(locals()))[0])


def ddim_sample_loop_progressive(
    diffusion: Any, model: Callable[..., Any], shape: Sequence[int], noise: Tensor | None = None,
    clip_denoised: bool = True, denoised_fn: Function = None, cond_fn: Function = None,
    model_kwargs: ModelKwargs = None, device: Any = None, progress: bool = False, eta: float = 0.0, **options: Any,
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """``ddim_sample_loop``, yielding {"sample": x, "pred_xstart": x̂_0 (as cond_fn moved it)} after every step."""
    return _dicts(*_run(dict(locals())))


def plan_of(diffusion: Any, *, clip_denoised: bool = True, eta: float | None = None, prediction: str = "") -> Plan:
    """The plan that a diffusion samples by: DDPM's, or DDIM's where there is an eta."""
    mean, variance = (getattr(diffusion, kind).name for kind in ("model_mean_type", "model_var_type"))
    if mean not in PREDICTIONS:
        raise ValueError(f"diffusion.model_mean_type is {mean}; it must be one of {', '.join(PREDICTIONS)}")
    if variance not in VARIANCES:
        raise ValueError(f"diffusion.model_var_type is {variance}; it must be one of {', '.join(VARIANCES)}")
    options: dict[str, Any] = {"prediction": prediction or PREDICTIONS[mean], "clip": 1.0 if clip_denoised else None}
    schedule = NoiseSchedule.from_alphas_cumprod(diffusion.alphas_cumprod)
    if eta is None:
        plan = ddpm(schedule, variance=VARIANCES[variance], **options)
    else:
        plan = ddim(schedule, eta=eta, use_clipped_model_output=True, **options)
    told = getattr(diffusion, "timestep_map", range(len(schedule)))
    scale = 1000 / getattr(diffusion, "original_num_steps", len(schedule)) if diffusion.rescale_timesteps else 1
    return replace(plan, rows=tuple(replace(row, t=told[int(row.t)] * scale) for row in plan))


def _run(given: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The arguments of ``sample``, and a list to hold the last gradient where that moves x̂_0 (DDIM's cond_fn)."""
    diffusion, model, shape, noise, options = (given[k] for k in ("diffusion", "model", "shape", "noise", "options"))
    denoised_fn, cond_fn, eta, device = given["denoised_fn"], given["cond_fn"], given.get("eta"), given["device"]
    plan = plan_of(diffusion, clip_denoised=given["clip_denoised"], eta=eta)
    rows, moved = iter(plan), list[Tensor]()

    def told(t: Tensor) -> Tensor:
        return t.float() if diffusion.rescale_timesteps else t

    def network(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        out = model(x, told(t), **kwargs)
        if eta is not None:
            out = out[:, : x.shape[1]]  # DDIM has no use for a learned variance
        if denoised_fn is None:
            return out
        row, (m, *variance) = next(rows), out.split(x.shape[1], dim=1)
        return torch.cat([denoised_fn(row.p * x + row.q * m), *variance], dim=1)

    def gradient(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        moved[:] = [cond_fn(x, told(t), **kwargs)]
        return moved[0]

    if device is None:
        device = noise.device if noise is not None else next(model.parameters()).device
    x = initial(shape, device, options) if noise is None else noise.to(device)
    fixed: dict[str, Any] = {"sampler": plan, "model_kwargs": given["model_kwargs"], "progress": given["progress"]}
    if denoised_fn is not None:  # then the network's x̂_0 is made here, row by row
        fixed["sampler"] = plan_of(diffusion, clip_denoised=given["clip_denoised"], eta=eta, prediction="sample")
        fixed["cuda_graph"] = False
    if cond_fn is not None:
        fixed["cond_fn"] = gradient
    return dict(model=network, shape=shape, **fixed, **run_from(x, shape, options)), moved if eta is not None else []


def _dicts(arguments: dict[str, Any], moved: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    plan = arguments["sampler"]

    def shown(state: State) -> dict[str, Tensor]:
        row, x0 = plan[state.row - 1], state.x0
        assert x0 is not None
        return {"sample": state.x, "pred_xstart": x0 + row.sigma**2 / row.alpha * moved[0] if moved else x0}

    return map(shown, islice(sample_iter(**arguments), 1, None))  # not the state before the first step
