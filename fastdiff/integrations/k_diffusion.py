"""k-diffusion's samplers: import them from here instead.

from fastdiff.integrations.k_diffusion import sample_dpmpp_2m
x = sample_dpmpp_2m(model, torch.randn(shape) * sigmas[0], sigmas)

``model(x, sigma, **extra_args)`` returns the denoised image, sigma being [B]; x is x_0 + σ ε; ``sigmas`` fall and may
end in 0. Each sampler takes its namesake's arguments, and further ones of ``fastdiff.sample`` (seed=, generator=,
backend=, …), computes in float32 and returns x's dtype. ``disable`` is tqdm's.

Noise comes from noise_sampler(sigma, sigma_next), from the source that the options name, or from torch.randn_like(x),
in the library's order. The SDE samplers take that too in place of a Brownian tree, with its distribution: but images of
the same seed in different numbers of steps do not resemble one another as the tree's do, which can be given as
noise_sampler. Under seed= and the like the two draws of a step of sample_dpmpp_sde are independent.

``callback`` gets the library's dict after the step's first update: what it writes to x or denoised changes nothing.

All raise TypeError and ValueError, naming the argument, for sigmas that do not fall and for options out of range.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdiff import samplers
from fastdiff.integrations.common import has_source, run_from
from fastdiff.plan.plan import Plan
from fastdiff.sampling.noise_source import NoiseFunction
from fastdiff.sampling.sample import sample, sample_iter
from fastdiff.schedules.continuous import EDMSchedule
from fastdiff.schedules.spacing import Spacing

Model = Callable[..., Tensor]
Arguments = Mapping[str, Any] | None
Callback = Callable[[dict[str, Any]], Any] | None
Noise = Callable[[Tensor, Tensor], Tensor] | None


def sample_euler(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Algorithm 2 of Karras et al. 2022 with Euler's steps (``samplers.euler``)."""
    return _sample(samplers.euler, dict(locals()))


def sample_euler_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Euler's steps to σ_down, and noise (``samplers.euler_ancestral``)."""
    return _sample(samplers.euler_ancestral, dict(locals()))


def sample_heun(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Algorithm 2 of Karras et al. 2022 (``samplers.heun``)."""
    return _sample(samplers.heun, dict(locals()))


def sample_dpm_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Midpoint steps in ln σ (``samplers.dpm2``)."""
    return _sample(samplers.dpm2, dict(locals()))


def sample_dpm_2_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Midpoint steps to σ_down, and noise (``samplers.dpm2_ancestral``)."""
    return _sample(samplers.dpm2_ancestral, dict(locals()))


def sample_lms(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, order: int = 4, **options: Any,
) -> Tensor:  # fmt: skip
    """The linear multistep method (``samplers.lms``)."""
    return _sample(samplers.lms, dict(locals()))


def sample_dpmpp_2s_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) to σ_down, and noise (``samplers.dpmpp_2s_ancestral``)."""
    return _sample(samplers.dpmpp_2s_ancestral, dict(locals()))


def sample_dpmpp_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, r: float = 0.5,
    **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver++ with noise in both rows of a step (``samplers.dpmpp_sde``)."""
    return _sample(samplers.dpmpp_sde, dict(locals()))


def sample_dpmpp_2m(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) (``samplers.dpmpp_2m``)."""
    return _sample(samplers.dpmpp_2m, dict(locals()), lower_order_final=False)


def sample_dpmpp_2m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None,
    solver_type: str = "midpoint", **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) SDE (``samplers.dpmpp_2m_sde``)."""
    return _sample(samplers.dpmpp_2m_sde, dict(locals()), lower_order_final=False)


def sample_dpmpp_3m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) SDE (``samplers.dpmpp_3m_sde``)."""
    return _sample(samplers.dpmpp_3m_sde, dict(locals()), lower_order_final=False)


def _sample(sampler: Callable[..., Plan], given: dict[str, Any], **own: Any) -> Tensor:
    """Run a sampler: ``given`` holds the function's arguments, of which those not named here are the sampler's own."""
    model, x, sigmas, extra_args, callback, disable, options = (
        given.pop(name) for name in ("model", "x", "sigmas", "extra_args", "callback", "disable", "options")
    )
    noise_sampler = given.pop("noise_sampler", None)
    if not callable(model):
        raise TypeError(f"model must be callable; got {type(model).__name__}")
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        raise TypeError(f"sigmas must be a tensor of one dimension; got {sigmas!r}")
    # The network is shown x itself and told σ.
    plan = sampler(EDMSchedule(), prediction="sample", spacing=Spacing(sigmas=sigmas.tolist()), **own, **given)
    plan = replace(plan, rows=tuple(replace(row, t=row.sigma, c_in=1.0) for row in plan))
    steps = _steps(plan)

    def denoise(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        return model(x, sigma.to(x.dtype), **kwargs)

    noise = _noise(plan, steps, x, sigmas, noise_sampler)
    if noise_sampler is not None:
        if has_source(options):
            raise ValueError("noise_sampler goes without another source of noise")
        options = {**options, "noise_fn": noise}
    show = not disable if disable is not None else sys.stderr.isatty()
    arguments = dict(sampler=plan, model_kwargs=extra_args, progress=show, **run_from(x, x.shape, options, noise))
    if callback is None:
        return sample(denoise, x.shape, **arguments).to(x.dtype)
    before, states = x, sample_iter(denoise, x.shape, **arguments)
    next(states)  # x itself
    for state in states:
        row, i = plan[state.row - 1], steps[state.row - 1]
        if row.calls_model and not row.uses("anchor"):
            hat = sigmas.new_tensor(row.sigma)  # beyond sigmas[i] where there was churn
            callback({"x": before, "i": i, "sigma": sigmas[i], "sigma_hat": hat, "denoised": state.x0})
        before = state.x
    return before.to(x.dtype)


def _steps(plan: Plan) -> list[int]:
    """The step that each row belongs to: it begins with churn, or else with a call that reads no anchor."""
    steps: list[int] = []
    for k, row in enumerate(plan):
        begins = k == 0 or (plan[k - 1].calls_model and not row.uses("anchor"))
        steps.append((steps[-1] if steps else -1) + begins)
    return steps


def _noise(plan: Plan, steps: list[int], x: Tensor, sigmas: Tensor, noise_sampler: Noise) -> NoiseFunction:
    """The noise of each row, from ``noise_sampler`` or from torch's global generator."""
    count, first = 0, torch.empty(0)  # draws of churn, and the first draw of a step of two

    def noise(stream: int, row: int, shape: tuple[int, ...]) -> Tensor:
        nonlocal count, first
        i, churns = steps[row], not plan[row].calls_model
        middle = None if churns or row + 1 == len(plan) or steps[row + 1] != i else plan[row + 1].sigma
        if noise_sampler is not None:
            return noise_sampler(sigmas[i], sigmas[i + 1] if middle is None else sigmas.new_tensor(middle))
        z = torch.randn_like(x)
        while churns and count < i:  # the library draws in every step, whether or not it then adds noise
            z, count = torch.randn_like(x), count + 1
        if churns:
            count = i + 1
        elif middle is not None:
            first = z
        elif row and steps[row - 1] == i and plan[row - 1].uses("z"):
            # A Brownian path's increments to the step's middle and to its end share the first part.
            shared = (float(sigmas[i]) - plan[row].sigma) / (float(sigmas[i]) - float(sigmas[i + 1]))
            z = math.sqrt(shared) * first + math.sqrt(1 - shared) * z
        return z

    return noise
