"""Interpolation between two images through the diffusion process (Ho, Jain & Abbeel 2020, Section 4.4).

The noised images are mixed linearly, as there, or on the great circle between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import as_float, check_finite, check_int, kind_of
from fastdiff.noise import INITIAL, noise_key
from fastdiff.ops.randn import randn
from fastdiff.plan.plan import Plan
from fastdiff.samplers.resolve import resolve_plan
from fastdiff.sampling.model import check_model
from fastdiff.sampling.sample import bind, sample
from fastdiff.sampling.start import first_rows
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.resolve import resolve_table


def interpolate(
    model: Callable[..., Any],
    a: Tensor,
    b: Tensor,
    weights: Sequence[float],
    *,
    t: int | None = None,
    noise: str = "independent",
    mix: str = "linear",
    schedule: NoiseSchedule | str = "linear",
    seed: int = 0,
    **arguments: Any,
) -> Tensor:
    """Encode two images with q at the same t, mix x̄_t = (1 − λ) x_t + λ x'_t, and run the reverse process from there.

    x_t and x'_t are the same for every λ, and so is the noise of every reverse step. λ = 0 and λ = 1 give the two
    reconstructions. (The paper's text prints x_0 in the mix; its code, and this, mix x_t.)

    Args:
        model: the network, as for ``fastdiff.sample``.
        a, b: two images [C, …] of one shape, floating-point, on the model's device.
        weights: λ of each result.
        t: how many of the schedule's timesteps to encode by, 0 to T; the paper's 500 is index 499. At 0 the result is
            the mix of the pixels. The default keeps the paper's signal-to-noise ratio for the image's size
            (``matched_timesteps``): 500 at 256 pixels, 125 at 32, 30 at 8. A plan of fewer steps begins at its first
            timestep below t.
        noise: "independent", as the paper has it: the two images draw their own noise, so the mix has variance
            ((1 − λ)² + λ²)(1 − ᾱ_t); "shared": both draw the same, which keeps 1 − ᾱ_t.
        mix: "linear", as the paper has it, or "spherical" (``slerp``), which keeps the length of x_t, and so the
            variance that the network expects, with independent noise too.
        schedule, seed: as for ``fastdiff.sample``.
        arguments: other arguments of ``fastdiff.sample``, such as a trained folder's; without a sampler among them,
            DDPM over every timestep below t. Tensors in model_kwargs have one entry a result.

    Returns:
        float32 [len(weights), C, …].
    """
    shape, told = run_between(
        model, a, b, weights, t=t, noise=noise, mix=mix, schedule=schedule, seed=seed, **arguments
    )
    return sample(model, shape, **told)


def run_between(
    model: Callable[..., Any],
    a: Tensor,
    b: Tensor,
    weights: Sequence[float],
    *,
    t: int | None = None,
    noise: str = "independent",
    mix: str = "linear",
    schedule: NoiseSchedule | str = "linear",
    seed: int = 0,
    **arguments: Any,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape and the other arguments with which ``interpolate`` calls ``sample``, such as a recipe keeps."""
    for name, image in (("a", a), ("b", b)):
        if not isinstance(image, Tensor) or not image.is_floating_point():
            got = image.dtype if isinstance(image, Tensor) else kind_of(image)
            raise TypeError(f"{name} must be a floating-point tensor; got {got}")
        if image.layout != torch.strided or image.is_meta:
            raise TypeError(f"{name} must be a dense tensor; got a {image.layout} one on {image.device}")
        check_finite(name, image)
    check_model(model)
    if a.shape != b.shape or a.ndim < 1 or a.device != b.device:
        raise ValueError(
            f"a and b must be [C, …] of one shape, on one device; got {list(a.shape)} on {a.device} and "
            f"{list(b.shape)} on {b.device}"
        )
    if isinstance(weights, (np.ndarray, Tensor)) and weights.ndim == 1:
        weights = weights.tolist()
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a sequence of numbers; got {type(weights).__name__}")
    if not all(isinstance(w, Real) for w in weights):
        raise TypeError(f"weights must be numbers; got {list(weights)}")
    lambdas = [as_float(w) for w in weights]
    if not lambdas or not all(math.isfinite(w) for w in lambdas):
        raise ValueError(f"weights must be finite numbers, at least one; got {list(weights)}")
    if noise not in ("independent", "shared"):
        raise ValueError(f"noise is {noise!r}; it must be 'independent' or 'shared'")
    if mix not in ("linear", "spherical"):
        raise ValueError(f"mix is {mix!r}; it must be 'linear' or 'spherical'")
    taken = {"x_T", "x_init", "start_step", "resume", "strength", "seeds", "sample_offset", "generator",
             "noise_fn"} & set(arguments)  # fmt: skip
    if taken:
        raise ValueError(f"interpolate sets {', '.join(sorted(taken))} itself; leave them out")
    bind(model, a.shape, **arguments)  # a TypeError for a name that sample does not know
    noise_key(2, a.device, seed)
    schedule = resolve_table(schedule)
    T = len(schedule)
    t = matched_timesteps(schedule, a.shape[-1]) if t is None else check_int("t", t, 0, T)

    names = ("sampler", "steps", "prediction", "variance", "spacing", "eta", "clip", "sampler_options")
    options = {"sampler": "ddpm", "schedule": schedule, **{k: arguments.pop(k) for k in names if k in arguments}}
    if isinstance(options["sampler"], Plan):
        del options["schedule"]
    plan = resolve_plan(**options)

    mixed = slerp if mix == "spherical" else lerp
    ends = torch.stack([a, b]).to(torch.float32)
    shape = (len(lambdas), *a.shape)
    if t == 0:
        return shape, {**arguments, "sampler": plan, "x_init": mixed(ends[0], ends[1], lambdas), "strength": 0.0}
    plan, start = _entry(plan, t, options)
    row = plan[start]
    z = randn(ends.shape, seed=seed, stream=INITIAL, device=a.device)
    if noise == "shared":
        z = z[:1].expand_as(z)
    x_t = ends * row.alpha + z * row.sigma
    # One seed for all results: each then draws sample 0's noise in every reverse step.
    begins = {"x_T": mixed(x_t[0], x_t[1], lambdas), "start_step": start, "seeds": [seed] * len(lambdas)}
    return shape, {**arguments, "sampler": plan, **begins}


def _entry(plan: Plan, t: int, options: dict[str, Any]) -> tuple[Plan, int]:
    """(plan, the row of its first timestep below t): where the images are encoded.

    Of a plan whose rows read a history there, the levels from that one on, so that it begins without one.
    """
    steps, begins = options.get("steps"), first_rows(plan)
    several = len(begins) == steps != len(plan)  # calls a step: the first of each is where it can begin
    start = next((i for i, row in enumerate(plan) if row.t <= t - 1 and (i in begins or not several)), None)
    if start is None or plan[-1].sigma > plan[0].sigma:
        raise ValueError(f"t is {t}, but the plan {plan.name!r} does not lead to an image from a timestep below it")
    if start in plan.entries:
        return plan, start
    if isinstance(options["sampler"], Plan) or len(plan) != steps:
        raise ValueError(f"t is {t}, but there the plan {plan.name!r} reads a history that only earlier rows write")
    skip = {**(options.get("sampler_options") or {}), "skip": start}
    return resolve_plan(**{**options, "sampler_options": skip}), 0


def lerp(a: Tensor, b: Tensor, weights: Sequence[float]) -> Tensor:
    """(1 − λ) a + λ b for each λ, [len(weights), *a.shape]."""
    mix = torch.tensor(weights, dtype=torch.float32, device=a.device).view(-1, *[1] * a.ndim)
    return (1 - mix) * a + mix * b


def slerp(a: Tensor, b: Tensor, weights: Sequence[float]) -> Tensor:
    """sin((1 − λ) θ)/sin θ · a + sin(λ θ)/sin θ · b for each λ, θ the angle between a and b as vectors.

    Shoemake 1985; for latents, Song et al. 2021, Equation 67. λ = 0 and λ = 1 give a and b to the bit. ``lerp`` where
    the two are parallel, opposite or zero, which leaves the great circle undefined. Waits for the device.

    Args:
        a, b: float32, of one shape. weights: the λ, any numbers.

    Returns:
        float32 [len(weights), *a.shape].
    """
    u, v = (end.to(torch.float64) / end.to(torch.float64).norm() for end in (a, b))
    # Half the angle from the lengths of the sum and the difference: accurate at every angle (Kahan 2006).
    theta = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    if not math.sin(theta) > 1e-6:
        return lerp(a, b, weights)
    shares = [(math.sin((1 - w) * theta) / math.sin(theta), math.sin(w * theta) / math.sin(theta)) for w in weights]
    first, second = (
        torch.tensor(share, dtype=torch.float32, device=a.device).view(-1, *[1] * a.ndim)
        for share in zip(*shares, strict=True)
    )
    return first * a + second * b


def matched_timesteps(schedule: NoiseSchedule, size: int) -> int:
    """The t at which a ``size``-pixel image is as noised as a 256-pixel one at t = 500, as the eye averages it.

    Averaging over k × k pixels divides the noise's variance by k², so SNR_size(t) = SNR_256(500)·(256/size)².
    """
    if size < 1:
        raise ValueError(f"an image must be at least one pixel wide to match its timesteps; got {size}: give t")
    bars = schedule.alphas_cumprod
    T = len(schedule)
    snr = bars / (1 - bars)
    paper = NoiseSchedule.linear().alphas_cumprod[499]
    target = paper / (1 - paper) * (256 / size) ** 2
    return min(int((snr > target).sum()) + 1, T)
