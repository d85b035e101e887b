"""lucidrains' denoising_diffusion_pytorch: ``sample(diffusion, …)`` for ``diffusion.sample(…)``.

from fastdiff.integrations import denoising_diffusion
images = denoising_diffusion.sample(diffusion, batch_size=16)  # [16, 3, 32, 32] in [0, 1]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.common import initial, run_from
from fastdiff.plan.plan import Plan
from fastdiff.samplers import ddim, ddpm
from fastdiff.sampling.sample import sample as run
from fastdiff.sampling.sample import sample_iter
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.spacing import Spacing

PREDICTIONS = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
READ = (
    "model", "betas", "objective", "image_size", "channels", "self_condition", "unnormalize",
    "is_ddim_sampling", "sampling_timesteps", "ddim_sampling_eta",
)  # fmt: skip


def sample(diffusion: Any, batch_size: int = 16, return_all_timesteps: bool = False, **options: Any) -> Tensor:
    """Draw images as ``diffusion.sample(batch_size, return_all_timesteps)`` does.

    DDPM over all timesteps, or DDIM with η = ``ddim_sampling_eta`` over ``sampling_timesteps`` of them; x̂_0 is clipped
    to ±1; the images are ``diffusion.unnormalize``'d, to [0, 1] unless it was made with ``auto_normalize=False``.
    Without a source of noise the numbers are torch.randn's, in the library's order.

    Args:
        diffusion: a ``GaussianDiffusion``; its model is called as (x, t, x_self_cond) and stays in the mode it is in.
        batch_size: B.
        return_all_timesteps: also return x_T and every state, [B, steps + 1, …].
        options: of ``fastdiff.sample``: seed=, seeds=, generator=, backend=, progress=, ….

    Returns:
        float32 [B, channels, height, width].

    Raises:
        ValueError: for a diffusion of another kind (learned variance, one-dimensional, class-conditional, …).
    """
    plan = plan_of(diffusion)
    size = diffusion.image_size
    shape = (batch_size, diffusion.channels, *(size if isinstance(size, (tuple, list)) else (size, size)))
    x = initial(shape, diffusion.betas.device, options)
    earlier: list[Tensor | None] = [None]  # x̂_0 of the row before, where the network is conditioned on it

    def model(x: Tensor, t: Tensor) -> Tensor:
        return diffusion.model(x, t, earlier[0])

    arguments = run_from(x, shape, options)
    if not (diffusion.self_condition or return_all_timesteps):
        return diffusion.unnormalize(run(model, shape, sampler=plan, **arguments))
    states = list[Tensor]()
    for state in sample_iter(model, shape, sampler=plan, **arguments):  # the first is x itself
        states = [*states, state.x] if return_all_timesteps else [state.x]
        if diffusion.self_condition:
            earlier[0] = state.x0
    return diffusion.unnormalize(torch.stack(states, dim=1) if return_all_timesteps else states[-1])


def plan_of(diffusion: Any) -> Plan:
    """The plan that a ``GaussianDiffusion`` samples by."""
    missing = [name for name in READ if not hasattr(diffusion, name)]
    if missing:
        raise ValueError(f"diffusion must be a GaussianDiffusion with discrete timesteps; it has no {missing[0]}")
    if diffusion.objective not in PREDICTIONS:
        raise ValueError(f"diffusion.objective is {diffusion.objective!r}; it must be one of {', '.join(PREDICTIONS)}")
    if getattr(diffusion.model, "out_dim", diffusion.channels) != diffusion.channels:
        raise ValueError(
            f"diffusion.model has {diffusion.model.out_dim} output channels for {diffusion.channels}: learned variances"
            " and weighted objectives are other samplers"
        )
    # The library keeps β in float32; ᾱ made from it in float64 is nearer to its float64 original than its own ᾱ.
    schedule = NoiseSchedule.from_betas(diffusion.betas)
    prediction = PREDICTIONS[diffusion.objective]
    if not diffusion.is_ddim_sampling:
        return ddpm(schedule, prediction=prediction, clip=1.0)
    # Evenly from −1, which stands for the clean image, to T − 1; fractions are cut off in float32.
    visited = (
        torch.linspace(-1, len(schedule) - 1, diffusion.sampling_timesteps + 1, device="cpu").int().tolist()[:0:-1]
    )
    eta = float(diffusion.ddim_sampling_eta)
    spacing = Spacing(timesteps=visited)
    return ddim(schedule, spacing=spacing, prediction=prediction, clip=1.0, eta=eta, use_clipped_model_output=True)
