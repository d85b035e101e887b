"""lucidrains' denoising_diffusion_pytorch: ``sample(diffusion, …)`` for ``diffusion.sample(…)``.

from fastdiff.integrations import denoising_diffusion
images = denoising_diffusion.sample(diffusion, batch_size=16)  # [16, 3, 32, 32] in [0, 1]

Served are GaussianDiffusion, GaussianDiffusion1D, LearnedGaussianDiffusion and ElucidatedDiffusion; not the continuous,
class-conditional and weighted ones, nor ElucidatedDiffusion's ``sample_using_dpmpp``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.common import has_source, initial, run_from, steps_of
from fastdiff.plan.plan import Plan
from fastdiff.samplers import ddim, ddpm, heun
from fastdiff.sampling.sample import sample as run
from fastdiff.sampling.sample import sample_iter
from fastdiff.schedules.continuous import EDMSchedule
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.spacing import Spacing

PREDICTIONS = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
READ = (
    "model", "betas", "objective", "channels", "self_condition", "unnormalize", "is_ddim_sampling",
    "sampling_timesteps", "ddim_sampling_eta",
)  # fmt: skip
READ_ELUCIDATED = (
    "net", "image_size", "channels", "self_condition", "num_sample_steps", "sigma_min", "sigma_max", "sigma_data",
    "rho", "S_churn", "S_tmin", "S_tmax", "S_noise",
)  # fmt: skip


def sample(diffusion: Any, batch_size: int = 16, return_all_timesteps: bool = False, **options: Any) -> Tensor:
    """Draw images, or sequences, as ``diffusion.sample(batch_size)`` does.

    DDPM over all timesteps (under learned variance, too), or DDIM with η = ``ddim_sampling_eta`` over
    ``sampling_timesteps`` of them; for an ElucidatedDiffusion, Algorithm 2 of Karras et al. 2022 in
    ``num_sample_steps`` steps. x̂_0 is clipped to ±1; the images are ``diffusion.unnormalize``'d, to [0, 1] unless it
    was made with ``auto_normalize=False``. Without a source of noise the numbers are torch.randn's, in the library's
    order.

    Args:
        diffusion: one of the classes named above. Its model is called as the library calls it, with x_self_cond where
            it is conditioned on its last x̂_0, and stays in the mode it is in.
        batch_size: B.
        return_all_timesteps: also return x_T and every state, [B, steps + 1, …]; not of an ElucidatedDiffusion.
        options: of ``fastdiff.sample``: seed=, seeds=, generator=, backend=, progress=, …; model_kwargs= are
            GaussianDiffusion1D's model_forward_kwargs.

    Returns:
        float32 [B, channels, height, width]; of a GaussianDiffusion1D [B, channels, length], or [B, length, channels]
        where it was made with ``channel_first=False``.

    Raises:
        ValueError: for a diffusion of another kind (continuous, class-conditional, weighted, …).
    """
    elucidated = hasattr(diffusion, "S_churn")
    if elucidated and return_all_timesteps:
        raise ValueError("return_all_timesteps is not for an ElucidatedDiffusion, whose steps have states between them")
    plan = plan_of(diffusion)
    shape = _shape(diffusion, batch_size)
    network = diffusion.net if elucidated else diffusion.model
    device = next(network.parameters()).device if elucidated else diffusion.betas.device
    x = plan.init_sigma * initial(shape, device, options)
    earlier: list[Tensor | None] = [None]  # x̂_0 of the row before, where the network is conditioned on it

    def model(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        if _learned(diffusion):
            out = network(x, t, **kwargs)
            return out if plan.learned_variance else out.chunk(2, dim=1)[0]
        if hasattr(diffusion, "seq_length") and earlier[0] is None:
            return network(x, t, **kwargs)
        if hasattr(diffusion, "seq_length"):
            return network(x, t, x_self_cond=earlier[0], **kwargs)
        return network(x, t, earlier[0], **kwargs)

    arguments = run_from(x, shape, options)
    if elucidated and not has_source(options):
        arguments["noise_fn"] = _drawn_each_step(plan, x)

    def unnormalize(x: Tensor) -> Tensor:
        return (x.clamp(-1, 1) + 1) * 0.5 if elucidated else diffusion.unnormalize(x)

    if not (diffusion.self_condition or return_all_timesteps):
        return unnormalize(run(model, shape, sampler=plan, **arguments))
    states = list[Tensor]()
    for state in sample_iter(model, shape, sampler=plan, **arguments):  # the first is x itself
        states = [*states, state.x] if return_all_timesteps else [state.x]
        if diffusion.self_condition and (state.row == 0 or plan[state.row - 1].calls_model):
            earlier[0] = state.x0
    return unnormalize(torch.stack(states, dim=1) if return_all_timesteps else states[-1])


def plan_of(diffusion: Any) -> Plan:
    """The plan that a diffusion samples by."""
    elucidated = hasattr(diffusion, "S_churn")
    size = ("seq_length",) if hasattr(diffusion, "seq_length") else ("image_size",)
    missing = [name for name in (READ_ELUCIDATED if elucidated else (*READ, *size)) if not hasattr(diffusion, name)]
    if missing:
        raise ValueError(
            "diffusion must be a GaussianDiffusion, GaussianDiffusion1D, LearnedGaussianDiffusion or"
            " ElucidatedDiffusion (those with continuous time or classes are not served); this"
            f" {type(diffusion).__name__} has no {missing[0]}"
        )
    if elucidated:
        return heun(
            EDMSchedule(diffusion.sigma_min, diffusion.sigma_max, diffusion.sigma_data), diffusion.num_sample_steps,
            prediction="edm", clip=1.0, spacing=Spacing("karras", rho=diffusion.rho), s_churn=diffusion.S_churn,
            s_tmin=diffusion.S_tmin, s_tmax=diffusion.S_tmax, s_noise=diffusion.S_noise,
        )  # fmt: skip
    if diffusion.objective not in PREDICTIONS:
        raise ValueError(f"diffusion.objective is {diffusion.objective!r}; it must be one of {', '.join(PREDICTIONS)}")
    learned = _learned(diffusion)
    if learned and diffusion.objective != "pred_noise":
        raise ValueError(
            f"diffusion.objective is {diffusion.objective!r}; a LearnedGaussianDiffusion's p_sample takes its model's"
            " output for noise whatever this says, so that it must be 'pred_noise'"
        )
    outputs = diffusion.channels * (2 if learned else 1)
    if getattr(diffusion.model, "out_dim", outputs) != outputs:
        raise ValueError(
            f"diffusion.model has {diffusion.model.out_dim} output channels for {diffusion.channels}: weighted"
            " objectives, and learned variances outside LearnedGaussianDiffusion, are other samplers"
        )
    # The library keeps β in float32; ᾱ made from it in float64 is nearer to its float64 original than its own ᾱ.
    schedule = NoiseSchedule.from_betas(diffusion.betas)
    prediction = PREDICTIONS[diffusion.objective]
    if not diffusion.is_ddim_sampling:
        variance = "learned_range" if learned else "fixed_small"
        return ddpm(schedule, prediction=prediction, clip=1.0, variance=variance)
    # Evenly from −1, which stands for the clean image, to T − 1; fractions are cut off in float32.
    visited = (
        torch.linspace(-1, len(schedule) - 1, diffusion.sampling_timesteps + 1, device="cpu").int().tolist()[:0:-1]
    )
    # ε follows from the clipped x̂_0; but a network's own stays as it is in those two classes.
    clipped = prediction != "epsilon" or not (learned or hasattr(diffusion, "seq_length"))
    return ddim(
        schedule, spacing=Spacing(timesteps=visited), prediction=prediction, clip=1.0,
        eta=float(diffusion.ddim_sampling_eta), use_clipped_model_output=clipped,
    )  # fmt: skip


def _learned(diffusion: Any) -> bool:
    """Whether it is a LearnedGaussianDiffusion."""
    return hasattr(diffusion, "vb_loss_weight")


def _shape(diffusion: Any, batch_size: int) -> tuple[int, ...]:
    channels = diffusion.channels
    if hasattr(diffusion, "seq_length"):
        length = diffusion.seq_length
        first = getattr(diffusion, "channel_first", True)
        return (batch_size, channels, length) if first else (batch_size, length, channels)
    size = diffusion.image_size
    return (batch_size, channels, *(size if isinstance(size, (tuple, list)) else (size, size)))


def _drawn_each_step(plan: Plan, x: Tensor) -> Callable[[int, int, tuple[int, ...]], Tensor]:
    """torch.randn as ElucidatedDiffusion draws it: in every step, whether or not noise is then added."""
    steps, drawn = steps_of(plan), 0

    def noise(stream: int, row: int, shape: tuple[int, ...]) -> Tensor:
        nonlocal drawn
        while drawn < steps[row]:
            torch.randn_like(x)
            drawn += 1
        drawn += 1
        return torch.randn_like(x)

    return noise
