"""The textbook, in plain PyTorch: Algorithms 1 and 2 of Ho, Jain & Abbeel (2020), untouched by any kernel.

These are what every benchmark is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from fastdiff.schedules.discrete import NoiseSchedule


def add_noise(x0: Tensor, t: Tensor, schedule: NoiseSchedule, noise: Tensor) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, Equation 4."""
    alphas_cumprod = schedule.alphas_cumprod.to(x0)[t].view(-1, *[1] * (x0.ndim - 1))
    return alphas_cumprod.sqrt() * x0 + (1 - alphas_cumprod).sqrt() * noise


def train_step(
    model: Callable[[Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer, x0: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """One step of Algorithm 1: x_0 ~ data, t ~ U{1 … T}, ε ~ N(0, I); descend on ‖ε − ε_θ(x_t, t)‖².

    Returns the loss.
    """
    t = torch.randint(0, len(schedule), (len(x0),), device=x0.device)
    noise = torch.randn_like(x0)
    loss = mse_loss(model(add_noise(x0, t, schedule, noise), t), noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def ddpm_step(
    x: Tensor, epsilon: Tensor, t: int, schedule: NoiseSchedule, noise: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """One step of Algorithm 2 from x_t to x_{t−1}, σ_t² = β̃_t; with x̂_0 clamped to ±clip where that is given.

    Noise is drawn with torch.randn_like where it is not given, and none is added at t = 0.
    """
    alphas_cumprod = schedule.alphas_cumprod.to(x)
    alpha_bar = alphas_cumprod[t]
    alpha_bar_p = alphas_cumprod[t - 1] if t > 0 else torch.ones_like(alpha_bar)
    alpha = alpha_bar / alpha_bar_p
    beta = 1 - alpha
    if clip is None:
        mean = (x - beta / (1 - alpha_bar).sqrt() * epsilon) / alpha.sqrt()
    else:
        x0 = ((x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()).clamp(-clip, clip)
        mean = alpha_bar_p.sqrt() * beta / (1 - alpha_bar) * x0 + alpha.sqrt() * (1 - alpha_bar_p) / (1 - alpha_bar) * x
    if t == 0:
        return mean
    sigma = ((1 - alpha_bar_p) / (1 - alpha_bar) * beta).sqrt()
    return mean + sigma * (torch.randn_like(x) if noise is None else noise)


def ddim_step(
    x: Tensor, epsilon: Tensor, t: int, t_next: int, schedule: NoiseSchedule, clip: float | None = None
) -> Tensor:
    """One deterministic step of DDIM (Song et al. 2021, Equation 12, η = 0) from t to t_next; −1 is the image."""
    alphas_cumprod = schedule.alphas_cumprod.to(x)
    alpha_bar = alphas_cumprod[t]
    alpha_bar_p = alphas_cumprod[t_next] if t_next >= 0 else torch.ones_like(alpha_bar)
    x0 = (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    return alpha_bar_p.sqrt() * x0 + (1 - alpha_bar_p).sqrt() * epsilon


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    schedule: NoiseSchedule,
    *,
    clip: float | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Algorithm 2: x_T ~ N(0, I), then every t from T to 1."""
    x = torch.randn(*shape, device=device)
    for t in reversed(range(len(schedule))):
        times = torch.full((len(x),), t, device=x.device)
        x = ddpm_step(x, model(x, times), t, schedule, clip=clip)
    return x
