"""Whole runs of ``fastdiff.sample`` beside the textbook's loop and diffusers' pipeline. Times are for one step.

The gate draws torch's own noise from one seed in every contestant (``generator=``), and compares the images, each value
to 1e-3. An accelerated network's may differ by 1e-3 of their size in root mean square, in bfloat16 by 5 %.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from gates import GPU, SCHEDULE, TextbookSchedule, alike, close
from torch import Tensor, nn

import fastdiff
from fastdiff import textbook
from fastdiff.acceleration.network import network_of

CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "attention_head_dim": None,
}
ACCELERATED = "fastdiff, accelerated"


class Output(NamedTuple):
    sample: Tensor


class Identity(nn.Module):
    """A network that returns its input, with what diffusers' pipeline asks of one: what is left is the loop."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.dtype = device, torch.float32
        self.config = SimpleNamespace(sample_size=32, in_channels=3)

    def forward(self, x: Tensor, t: Tensor) -> Output:
        return Output(x)


def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def accelerated(model: nn.Module) -> nn.Module:
    """A copy of a network on its fast path."""
    twin = copy.deepcopy(model)
    fastdiff.accelerate(twin)
    return twin


def tolerance(model: nn.Module) -> float:
    return 1e-3 if network_of(model).dtype == torch.float32 else 0.05


def seeded(call: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(0)
    return call()


@torch.no_grad()
def pipeline(scheduler, model, shape, steps, device, draws=None, **kwargs) -> Tensor:
    """The loop of diffusers' pipelines around our network: what stands before and after the loop is left out."""
    x = torch.randn(shape, generator=draws, device=device)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = model(x, t.expand(len(x)).to(device), **kwargs)
        x = scheduler.step(out if isinstance(out, Tensor) else out.sample, t, x, generator=draws).prev_sample
    return x


@torch.no_grad()
def textbook_ddim(model, shape, steps, device) -> Tensor:
    schedule, gap = TextbookSchedule(device), len(SCHEDULE) // steps
    x = torch.randn(shape, device=device)
    for t in reversed(range(0, len(SCHEDULE), gap)):
        x = textbook.ddim_step(x, model(x, torch.full((len(x),), t, device=device)), t, t - gap, schedule, clip=1.0)
    return x


def test_loop(contest, device, diffusers):
    """The loop's own cost at batch 1: a thousand steps of DDPM around a network that returns its input."""
    shape, network, schedule = (1, 3, 32, 32), Identity(device), TextbookSchedule(device)

    def ours(**noise):
        return fastdiff.sample(network, shape, clip=1.0, device=device, **noise)

    def textbook():
        return textbook.sample(lambda x, t: network(x, t).sample, shape, schedule, clip=1.0, device=device)

    theirs = None
    if diffusers:
        scheduler = diffusers.DDPMScheduler(beta_schedule="linear")
        pipe = diffusers.DDPMPipeline(unet=network, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        theirs = lambda **noise: pipe(output_type="pt", **noise).images  # noqa: E731

    right = ours(generator=generator(device))
    close(seeded(textbook), right, 1e-4)
    if theirs:
        close(theirs(generator=generator(device)), (right / 2 + 0.5).clamp(0, 1), 1e-4)

    def alone():
        t = torch.zeros(1, dtype=torch.int64, device=device)
        for _ in range(len(SCHEDULE)):
            network(right, t)

    contest(
        "sample",
        "DDPM around a network that returns its input",
        {"fastdiff": ours, "textbook": textbook, "diffusers": theirs, "the network's calls alone": alone},
        shape=shape,
        steps=len(SCHEDULE),
        targets=[{"kind": "ratio", "contestant": "diffusers", "goal": 10, "stretch": 1 / 0.06}],
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_digits(contest, device, diffusers, sampler):
    """The model in the package: 16 images of given classes in 50 steps."""
    if not (Path(fastdiff.__file__).parent / "assets" / "digits" / "config.json").is_file():
        pytest.skip("the package holds no digits model")
    trained, steps = fastdiff.models.digits(), 50
    model, shape, gap = trained.unet.to(device), (16, *trained.image_shape), len(SCHEDULE) // steps
    quick = accelerated(model)
    labels = torch.arange(16, device=device) % 10
    respaced = fastdiff.NoiseSchedule.from_alphas_cumprod(SCHEDULE.alphas_cumprod[::gap])

    def ours(network=model, **noise):
        return fastdiff.sample(
            network, shape, sampler=sampler, steps=steps, clip=1.0, model_kwargs={"class_labels": labels}, **noise
        )

    @torch.no_grad()
    def labelled(x, t):
        return model(x, t, class_labels=labels)

    def textbook():
        if sampler == "ddim":
            return textbook_ddim(labelled, shape, steps, device)
        return textbook.sample(lambda x, t: labelled(x, gap * t), shape, respaced, clip=1.0, device=device)

    theirs = None
    if diffusers:
        scheduler = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}[sampler](beta_schedule="linear")
        theirs = lambda draws=None: pipeline(scheduler, labelled, shape, steps, device, draws)  # noqa: E731

    right = ours(generator=generator(device))
    close(seeded(textbook), right, 1e-3)
    alike(ours(quick, generator=generator(device)), right, tolerance(quick))
    if theirs:
        close(theirs(generator(device)), right, 1e-3)
    contest(
        "sample",
        f"{sampler.upper()}, the digits model",
        {"fastdiff": ours, ACCELERATED: lambda: ours(quick), "textbook": textbook, "diffusers": theirs},
        shape=shape,
        steps=steps,
        seconds=2 if GPU else 10,
    )


@pytest.mark.parametrize("batch", [4, 64] if GPU else [4])
def test_cifar10(contest, device, diffusers, batch):
    """The network of DDPM's CIFAR-10 model with random weights, a few steps: here the network is nearly everything."""
    shape, steps = (batch, 3, 32, 32), 20 if GPU else 4
    schedule = fastdiff.NoiseSchedule.linear(steps)
    torch.manual_seed(0)
    model = fastdiff.models.UNet(**CIFAR10).eval().to(device)
    quick = accelerated(model)

    def ours(network=model, **noise):
        return fastdiff.sample(network, shape, schedule=schedule, clip=1.0, **noise)

    def textbook():
        return textbook.sample(model, shape, schedule, clip=1.0, device=device)

    theirs = None
    if diffusers:
        unet = diffusers.UNet2DModel(**CIFAR10).eval().to(device)
        unet.load_state_dict(model.state_dict())
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=steps, beta_schedule="linear")
        pipe = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        theirs = lambda **n: pipe(batch, num_inference_steps=steps, output_type="pt", **n).images  # noqa: E731

    right = ours(generator=generator(device))
    close(seeded(textbook), right, 1e-3)
    alike(ours(quick, generator=generator(device)), right, tolerance(quick))
    if theirs:
        close(theirs(generator=generator(device)), (right / 2 + 0.5).clamp(0, 1), 1e-3)
    contest(
        "sample",
        "DDPM, the CIFAR-10 network",
        {"fastdiff": ours, ACCELERATED: lambda: ours(quick), "textbook": textbook, "diffusers": theirs},
        shape=shape,
        steps=steps,
        seconds=3 if GPU else 15,
    )
