"""The networks that the fast path is tried on, with inputs; every parameter random, so that none is a no-op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

import fastdiff

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
CELEBA256 = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}
SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
# Stable Diffusion 1.5's, with an eighth of its width.
SD15 = {
    "sample_size": 64,
    "block_out_channels": (40, 80, 160, 160),
    "norm_num_groups": 8,
    "cross_attention_dim": 96,
    "attention_head_dim": 8,
}
VAE = {
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


SHAPE = (2, 3, 16, 16)  # of ``small``'s inputs


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).abs().max() / b.abs().max()) <= tolerance


class Case(NamedTuple):
    """A network in eval mode, and a call of it with inputs cast to a dtype."""

    network: nn.Module
    call: Callable[[nn.Module, torch.dtype], Tensor]


def randomized(network: nn.Module) -> nn.Module:
    """In eval mode, with scales and biases that are not the ones and zeros that torch starts from.

    Attention's weights are larger than torch starts from, which would give every key about the same weight: scores
    have a standard deviation of 2. With 4, one ulp in the input moved the output of a network of many attentions by
    more than the 1e-5 that two right networks are to agree within.
    """
    larger = {"to_q": 2**0.5, "to_k": 2**0.5, "to_out.0": 2.0}
    for path, module in network.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.ndim == 1:
                nn.init.normal_(p, 1.0 if name == "weight" else 0.0, 0.2)
            elif scale := next((scale for end, scale in larger.items() if path.endswith(end)), None):
                nn.init.normal_(p, 0.0, scale / p.shape[1] ** 0.5)
    return network.eval().requires_grad_(False)


def small(**more: Any) -> nn.Module:
    return randomized(fastdiff.models.UNet(**(SMALL | more)))


def unet2d(config: dict[str, Any], batch: int, size: int) -> Case:
    x, t = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    return Case(randomized(diffusers.UNet2DModel(**config)), lambda m, dtype: m(x.to(dtype), t).sample)


def cifar10() -> Case:
    return unet2d(CIFAR10, 4, 32)


def celeba256() -> Case:
    return unet2d(CELEBA256, 1, 64)


def scale_shift() -> Case:
    blocks = {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D")}
    return unet2d(SMALL | blocks | {"resnet_time_scale_shift": "scale_shift"}, 14, 16)


def rescaled() -> Case:
    return unet2d(SMALL | {"mid_block_scale_factor": 2**0.5, "attention_head_dim": 8}, 14, 16)


def ours() -> Case:
    x, t, labels = torch.randn(14, 3, 16, 16), torch.rand(14) * 999, torch.randint(0, 5, (14,))
    return Case(small(num_class_embeds=5, attention_head_dim=16), lambda m, dtype: m(x.to(dtype), t, labels))


def packaged() -> Case:
    x, t = torch.randn(160, 1, 8, 8), torch.randint(0, 1000, (160,))
    labels = torch.randint(0, 10, (160,))
    return Case(fastdiff.models.digits().unet.requires_grad_(False), lambda m, dtype: m(x.to(dtype), t, labels))


def sd15() -> Case:
    x, prompt = torch.randn(2, 4, 40, 40), torch.randn(2, 77, 96)
    network = randomized(diffusers.UNet2DConditionModel(**SD15))
    return Case(network, lambda m, dtype: m(x.to(dtype), torch.tensor(7), prompt.to(dtype)).sample)


def encoder() -> Case:
    x = torch.randn(3, 3, 48, 48)
    network = randomized(diffusers.AutoencoderKL(**VAE))
    return Case(network, lambda m, dtype: m.encode(x.to(dtype)).latent_dist.parameters)


def decoder() -> Case:
    z = torch.randn(3, 4, 40, 40)
    return Case(randomized(diffusers.AutoencoderKL(**VAE)), lambda m, dtype: m.decode(z.to(dtype)).sample)


class Usual(nn.Module):
    """What others' networks are made of: sequences of norm, activation and convolution, and a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.body = nn.Sequential(nn.GroupNorm(8, 24), nn.SiLU(), nn.Conv2d(24, 24, 3, padding=1, groups=2))
        self.odd = nn.Conv2d(24, 24, 3, padding=1, padding_mode="circular")
        self.tokens = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24, bias=False), nn.GELU())
        self.scale = nn.Parameter(torch.ones(24, 1, 1))
        self.last = nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.odd(self.body(h) * self.scale)
        return self.last(h + self.tokens(h.movedim(1, 3)).movedim(3, 1))


def usual() -> Case:
    x = torch.randn(5, 3, 31, 27)
    return Case(randomized(Usual()), lambda m, dtype: m(x.to(dtype)))


CASES = {
    f.__name__: f
    for f in (cifar10, celeba256, scale_shift, rescaled, ours, packaged, sd15, encoder, decoder, usual)
}  # fmt: skip


class Rounded(nn.Conv2d):
    """PyTorch's convolution in bfloat16: summed in float32, rounded once. A CPU without it takes minutes for that."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def halved(network: nn.Module) -> nn.Module:
    """A copy in bfloat16, as PyTorch computes it."""
    half = copy.deepcopy(network).bfloat16()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for module in half.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = Rounded
    return half


def oracle(case: Case) -> Tensor:
    with torch.no_grad():
        return case.call(copy.deepcopy(case.network).double(), torch.float64)
