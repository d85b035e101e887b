"""k-diffusion's samplers: import them from here instead.

from fastdiff.integrations.k_diffusion import sample_dpmpp_2m
x = sample_dpmpp_2m(model, torch.randn(shape) * sigmas[0], sigmas)

``model(x, sigma, **extra_args)`` returns the denoised image, sigma being [B]; x is x_0 + σ ε; ``sigmas`` fall and may
end in 0; those of sample_euler, sample_heun and sample_dpm_2 may rise ("unsampling") and repeat, too. Each sampler
takes its namesake's arguments, and further ones of ``fastdiff.sample`` (seed=, generator=, backend=, …), computes in
float32 and returns x's dtype. ``disable`` is tqdm's.

Noise comes from noise_sampler(sigma, sigma_next), from the source that the options name, or from torch.randn_like(x),
in the library's order. The SDE samplers take that too in place of a Brownian tree, with its distribution: but images of
the same seed in different numbers of steps do not resemble one another as the tree's do, which can be given as
noise_sampler. Under seed= and the like the two draws of a step of sample_dpmpp_sde are independent.

``callback`` gets the library's dict after the step's first update: what it writes to x or denoised changes nothing.

All raise TypeError and ValueError, naming the argument, for other sigmas and for options out of range.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastdiff import samplers
from fastdiff.integrations.k_diffusion.dpm import sample_dpm_adaptive, sample_dpm_fast
from fastdiff.integrations.k_diffusion.run import Arguments, Callback, Model, Noise, sample_along

__all__ = [
    "sample_dpm_2", "sample_dpm_2_ancestral", "sample_dpm_adaptive", "sample_dpm_fast", "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde", "sample_dpmpp_2s_ancestral", "sample_dpmpp_3m_sde", "sample_dpmpp_sde", "sample_euler",
    "sample_euler_ancestral", "sample_heun", "sample_lms",
]  # fmt: skip


def sample_euler(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Algorithm 2 of Karras et al. 2022 with Euler's steps (``samplers.euler``)."""
    return sample_along(samplers.euler, dict(locals()))


def sample_euler_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Euler's steps to σ_down, and noise (``samplers.euler_ancestral``)."""
    return sample_along(samplers.euler_ancestral, dict(locals()))


def sample_heun(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Algorithm 2 of Karras et al. 2022 (``samplers.heun``)."""
    return sample_along(samplers.heun, dict(locals()))


def sample_dpm_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Midpoint steps in ln σ (``samplers.dpm2``)."""
    return sample_along(samplers.dpm2, dict(locals()))


def sample_dpm_2_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Midpoint steps to σ_down, and noise (``samplers.dpm2_ancestral``)."""
    return sample_along(samplers.dpm2_ancestral, dict(locals()))


def sample_lms(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, order: int = 4, **options: Any,
) -> Tensor:  # fmt: skip
    """The linear multistep method (``samplers.lms``)."""
    return sample_along(samplers.lms, dict(locals()))


def sample_dpmpp_2s_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) to σ_down, and noise (``samplers.dpmpp_2s_ancestral``)."""
    return sample_along(samplers.dpmpp_2s_ancestral, dict(locals()))


def sample_dpmpp_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, r: float = 0.5,
    **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver++ with noise in both rows of a step (``samplers.dpmpp_sde``)."""
    return sample_along(samplers.dpmpp_sde, dict(locals()))


def sample_dpmpp_2m(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) (``samplers.dpmpp_2m``)."""
    return sample_along(samplers.dpmpp_2m, dict(locals()), lower_order_final=False)


def sample_dpmpp_2m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None,
    solver_type: str = "midpoint", **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) SDE (``samplers.dpmpp_2m_sde``)."""
    return sample_along(samplers.dpmpp_2m_sde, dict(locals()), lower_order_final=False)


def sample_dpmpp_3m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) SDE (``samplers.dpmpp_3m_sde``)."""
    return sample_along(samplers.dpmpp_3m_sde, dict(locals()), lower_order_final=False)
