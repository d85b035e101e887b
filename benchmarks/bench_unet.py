"""One call of a network: fastdiff's fast path beside eager PyTorch and torch.compile, and what each part of it brings.

The gate compares every contestant with the float32 network: 1e-4 for float32, 5 % of the largest value for bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_sample import CIFAR10
from gates import close
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff.fast import network as fast
from fastdiff.fast.blocks import Attention, DiffusersUp, Resnet, Up, Upsample
from fastdiff.fast.forward import Fast
from fastdiff.fast.leaves import Conv, GroupNorm, LayerNorm, Linear

CELEBA256 = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
FLOAT32, BFLOAT16 = "fastdiff, float32", "fastdiff"
GPU = torch.cuda.is_available()
CASES = {
    "CIFAR-10": (CIFAR10, (3, 32, 32), (1, 16, 64, 256) if GPU else (1, 8)),
    "CelebA-HQ 256": (CELEBA256, (3, 256, 256), (1, 16) if GPU else (1,)),
    "Stable Diffusion 1.5": (SD15, (4, 64, 64), (2,)),
}


def network(name: str, device: torch.device) -> nn.Module:
    import diffusers

    kind = diffusers.UNet2DConditionModel if name.startswith("Stable") else diffusers.UNet2DModel
    torch.manual_seed(0)
    return kind(**CASES[name][0]).eval().requires_grad_(False).to(device)


def formed(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    return copy.deepcopy(model).to(dtype=dtype, memory_format=layout)


def compiled(model: nn.Module) -> nn.Module:
    if not GPU:
        return torch.compile(model)
    return torch.compile(model, mode="max-autotune", fullgraph=True)


def accelerated(model: nn.Module, dtype: torch.dtype | str = "auto") -> nn.Module:
    twin = copy.deepcopy(model)
    fastdiff.accelerate(twin, dtype=dtype)
    return twin


def turns(models: dict[str, nn.Module], x: Tensor, more: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """A call of each, with inputs in its dtype and memory format."""

    def turn(model: nn.Module) -> Callable[[], Tensor]:
        p = next(p for p in model.parameters() if p.ndim == 4)
        known = isinstance(model, torch._dynamo.OptimizedModule) or fast.of(model) is None
        layout = torch.channels_last if known and not p.is_contiguous() else torch.contiguous_format
        inputs = [t.to(p.dtype) if t.is_floating_point() else t for t in more]
        mine = x.to(p.dtype).contiguous(memory_format=layout)

        @torch.no_grad()
        def call() -> Tensor:
            return model(mine, *inputs).sample

        return call

    return {name: turn(model) for name, model in models.items()}


def gate(calls: dict[str, Callable[[], Tensor]], right: Tensor, half: set[str]) -> None:
    size = float(right.abs().max())
    for name, call in calls.items():
        close(call().float() / size, right / size, 0.05 if name in half else 1e-4)


CONTESTS = [(name, batch) for name, (_, _, batches) in CASES.items() for batch in batches]


@pytest.mark.parametrize(("name", "batch"), CONTESTS, ids=[f"{n}-{b}" for n, b in CONTESTS])
def test_step(contest, device, diffusers, name, batch):
    if diffusers is None:
        pytest.skip("diffusers is not installed")
    model = network(name, device)
    large = name.startswith("Stable") and not GPU  # its copies would fill the memory
    shape = (batch, *CASES[name][1])
    x = torch.randn(shape, device=device)
    more = (torch.full((batch,), 500, device=device),)
    if name.startswith("Stable"):
        more += (torch.randn(batch, 77, 768, device=device),)
    last, first = torch.channels_last, torch.contiguous_format
    models = {BFLOAT16: accelerated(model), FLOAT32: None if large else accelerated(model, torch.float32)}
    models |= {"diffusers' default: float32": model}
    if not large:
        models["float32, channels_last"] = formed(model, torch.float32, last)
        models["bfloat16"] = formed(model, torch.bfloat16, first)
    models["bfloat16, channels_last"] = formed(model, torch.bfloat16, last)
    if name == "CIFAR-10":
        models["torch.compile, float32"] = compiled(formed(model, torch.float32, last))
        models["torch.compile, bfloat16"] = compiled(formed(model, torch.bfloat16, last))
    models = {key: value for key, value in models.items() if value is not None}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        right = model(x, *more).sample
    calls = turns(models, x, more)
    bf16 = fast.of(models[BFLOAT16]).context.dtype == torch.bfloat16
    gate(calls, right, {key for key in models if "bfloat16" in key or (key == BFLOAT16 and bf16)})
    contest(
        "unet",
        name,
        calls,
        shape=shape,
        flops=counter.get_total_flops(),
        targets=targets(name, batch) if bf16 else [],
        seconds=45 if name == "CIFAR-10" else 20,
        warm=False,
    )


def targets(name: str, batch: int) -> list[dict[str, Any]]:
    if name != "CIFAR-10":
        return []
    if GPU:
        goals = {1: (15, 1.5), 64: (2.5, 1.15)}.get(batch)
        names = ("diffusers' default: float32", "torch.compile, bfloat16")
        return [{"kind": "ratio", "contestant": n, "goal": g} for n, g in zip(names, goals or (), strict=False)]
    if batch != 8:
        return []
    return [
        {"kind": "ratio", "contestant": "diffusers' default: float32", "goal": 2.0, "stretch": 2.3},
        {"kind": "ratio", "contestant": "float32, channels_last", "ours": FLOAT32, "goal": 1.10},
        {"kind": "ratio", "contestant": "bfloat16, channels_last", "goal": 1.15, "stretch": 1.25},
        {"kind": "ratio", "contestant": "torch.compile, float32", "ours": FLOAT32, "goal": 1.0},
        {"kind": "ratio", "contestant": "torch.compile, bfloat16", "goal": 1.0},
    ]


PARTS = {
    "+ packed weights": (Conv, Linear, LayerNorm),
    "+ fused blocks: GroupNorm with SiLU, embedding, skip; residuals": (GroupNorm, Resnet, Up, DiffusersUp),
    "+ attention without layout copies": (Attention,),
    "fastdiff": (Upsample,),
}


@pytest.mark.parametrize("batch", [1, 64] if GPU else [8])
def test_ablation(contest, device, diffusers, batch):
    """From diffusers' default to the whole fast path, one part after another, in bfloat16 where that is native."""
    if diffusers is None:
        pytest.skip("diffusers is not installed")
    model = network("CIFAR-10", device)
    dtype = fast.native_dtype(model)
    x, t = torch.randn(batch, 3, 32, 32, device=device), torch.full((batch,), 500, device=device)
    models = {
        "diffusers' default: float32": model,
        "+ channels_last": formed(model, torch.float32, torch.channels_last),
        f"+ {str(dtype).removeprefix('torch.')}": formed(model, dtype, torch.channels_last),
    }
    kinds: tuple[type[Fast], ...] = ()
    for name, more in PARTS.items():
        kinds += more
        models[name] = copy.deepcopy(model)
        fast.put(models[name], dtype, kinds)
    with torch.no_grad():
        right = model(x, t).sample
    calls = turns(dict(sorted(models.items(), key=lambda item: item[0] != "fastdiff")), x, (t,))
    gate(calls, right, set(models) if dtype != torch.float32 else set())
    contest("unet, part by part", "CIFAR-10", calls, shape=tuple(x.shape), seconds=40, warm=False)
