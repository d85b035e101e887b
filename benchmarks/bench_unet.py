"""One call of a network: fastdiff's fast path beside eager PyTorch and torch.compile, and what each part of it brings.

On a GPU fastdiff's turn is a whole step of a sampling of a thousand, as ``fastdiff.sample`` runs it: one graph of
network, update and step counter. The others' turns are their network's call alone, without scheduler or noise.

The gate compares every network with the float32 one: 1e-4 of the largest value for float32 (5e-3 on a GPU, where
PyTorch's convolutions round to tf32 by default), 5 % for bfloat16; and the first step of the graph with the same step
run eagerly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_sample import CIFAR10
from gates import GPU, close
from stepping import eager_step, first_step, steps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff.acceleration.attention import Attention
from fastdiff.acceleration.blocks import CrossAttentionUp, DiffusersUp, Downsample, Resnet, Up, Upsample
from fastdiff.acceleration.known import KNOWN
from fastdiff.acceleration.layers import Conv, GroupNorm, LayerNorm, Linear, Sequential
from fastdiff.acceleration.module import StandIn
from fastdiff.acceleration.network import computes_bfloat16, install, network_of
from fastdiff.acceleration.replay import AFTER

CELEBA256 = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
FLOAT32, BFLOAT16 = "fastdiff, float32", "fastdiff"
STEPS = 1000
CALLS = 5  # of a network in a turn on a GPU
CASES = {
    "CIFAR-10": (CIFAR10, (3, 32, 32), (1, 16, 64, 256) if GPU else (1, 8)),
    "CelebA-HQ 256": (CELEBA256, (3, 256, 256), (1, 16) if GPU else (1,)),
    "Stable Diffusion 1.5": (SD15, (4, 64, 64), (2,) if GPU else ()),  # on a CPU bench_text.py has it
}


def network(name: str, device: torch.device) -> nn.Module:
    import diffusers

    kind = diffusers.UNet2DConditionModel if name.startswith("Stable") else diffusers.UNet2DModel
    torch.manual_seed(0)
    with device:
        return kind(**CASES[name][0]).eval().requires_grad_(False)


def inputs(name: str, batch: int, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, t and what else the network takes."""
    x = torch.randn(batch, *CASES[name][1], device=device)
    prompt = {"encoder_hidden_states": torch.randn(batch, 77, 768, device=device)} if name.startswith("Stable") else {}
    return x, torch.full((batch,), 500, device=device), prompt


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


def turns(
    models: dict[str, nn.Module], x: Tensor, t: Tensor, more: dict[str, Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """A call of each, with inputs in its dtype and memory format."""

    def turn(model: nn.Module) -> Callable[[], Tensor]:
        p = next(p for p in model.parameters() if p.ndim == 4)
        known = isinstance(model, torch._dynamo.OptimizedModule) or network_of(model) is None
        layout = torch.channels_last if known and not p.is_contiguous() else torch.contiguous_format
        mine, kwargs = x.to(p.dtype).contiguous(memory_format=layout), {k: v.to(p.dtype) for k, v in more.items()}

        @torch.no_grad()
        def call() -> Tensor:
            return model(mine, t, **kwargs).sample

        return call

    return {name: turn(model) for name, model in models.items()}


def captured(model: nn.Module, shape: tuple[int, ...], more: dict[str, Tensor]) -> Callable[[], None]:
    """A turn that is a step of a sampling: one replay of the graph that holds it, the same as the eager step."""
    with torch.no_grad():
        close(first_step(model, shape, STEPS, more), eager_step(model, shape, STEPS, more), 1e-4)
    return steps(model, shape, STEPS, more)


def gate(calls: dict[str, Callable[[], Tensor]], right: Tensor, half: set[str]) -> None:
    size = float(right.abs().max())
    for name, call in calls.items():
        close(call().float() / size, right / size, 0.05 if name in half else 5e-3 if GPU else 1e-4)


CONTESTS = [(name, batch) for name, (_, _, batches) in CASES.items() for batch in batches]


@pytest.mark.parametrize(("name", "batch"), CONTESTS, ids=[f"{n}-{b}" for n, b in CONTESTS])
def test_step(contest, device, diffusers, name, batch):
    if diffusers is None:
        pytest.skip("diffusers is not installed")
    model = network(name, device)
    x, t, more = inputs(name, batch, device)
    last, first = torch.channels_last, torch.contiguous_format
    models = {BFLOAT16: accelerated(model), "diffusers' default: float32": model}
    bf16 = network_of(models[BFLOAT16]).dtype == torch.bfloat16  # else it takes minutes a step
    dtypes = [torch.float32, torch.bfloat16] if bf16 else [torch.float32]
    # Several dtypes and layouts, but where they would fill the memory or take too long.
    several = name == "CIFAR-10" or (name.startswith("Celeb") and not GPU)
    for dtype in dtypes if several else dtypes[-1:]:
        models[f"{text(dtype)}, channels_last"] = formed(model, dtype, last)
    if bf16 and several:
        models["bfloat16"] = formed(model, torch.bfloat16, first)
        if not GPU:
            models[FLOAT32] = accelerated(model, torch.float32)
    if name == "CIFAR-10" and not GPU:  # there test_compile has it
        for dtype in dtypes:
            models[f"torch.compile, {text(dtype)}"] = compiled(formed(model, dtype, last))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        right = model(x, t, **more).sample
    order = [BFLOAT16, FLOAT32, "diffusers' default: float32", "float32, channels_last", "bfloat16"]
    models = {key: models[key] for key in [*order, *models] if key in models}
    calls = turns(models, x, t, more)
    gate(calls, right, {key for key in models if "bfloat16" in key or (key == BFLOAT16 and bf16)})
    if GPU:
        calls[BFLOAT16] = captured(models[BFLOAT16], tuple(x.shape), more)
    contest(
        "unet",
        name,
        calls,
        shape=tuple(x.shape),
        flops=counter.get_total_flops(),
        targets=targets(name, batch, bf16),
        seconds=3 if GPU else 45 if name == "CIFAR-10" else 20,
        warm=False,
        calls=CALLS,
        timesteps=STEPS if GPU and not name.startswith("Stable") else 0,
    )


@pytest.mark.skipif(not GPU, reason="on a CPU torch.compile takes part in test_step")
@pytest.mark.parametrize("batch", [1, 64])
def test_compile(contest, device, diffusers, batch):
    """Beside torch.compile's best, which takes minutes to compile: a contest of its own."""
    if diffusers is None:
        pytest.skip("diffusers is not installed")
    model = network("CIFAR-10", device)
    x, t, more = inputs("CIFAR-10", batch, device)
    rival = "torch.compile, bfloat16, max-autotune"
    models = {BFLOAT16: accelerated(model), rival: compiled(formed(model, torch.bfloat16, torch.channels_last))}
    with torch.no_grad():
        right = model(x, t).sample
    calls = turns(models, x, t, more)
    gate(calls, right, set(models))
    calls[BFLOAT16] = captured(models[BFLOAT16], tuple(x.shape), more)
    contest(
        "unet, beside torch.compile",
        "CIFAR-10",
        calls,
        shape=tuple(x.shape),
        targets=[{"kind": "ratio", "contestant": rival, "goal": {1: 1.5, 64: 1.15}[batch]}],
        seconds=3,
        warm=True,
        timesteps=STEPS,
    )


@pytest.mark.skipif(GPU, reason="OpenVINO's turn is on a CPU")
@pytest.mark.parametrize("batch", [1, 8])
def test_openvino(contest, device, diffusers, batch):
    """Beside OpenVINO with static shapes and as many threads as PyTorch has, which needs minutes to convert a network.

    Each turn is a warm call and then a block of calls, since OpenVINO's thread pool and PyTorch's take the cores from
    each other while one of them winds down.
    """
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    if diffusers is None:
        pytest.skip("diffusers is not installed")
    model = network("CIFAR-10", device)
    x, t, more = inputs("CIFAR-10", batch, device)
    bf16 = computes_bfloat16(model)
    dtypes = [torch.float32, torch.bfloat16] if bf16 else [torch.float32]
    with torch.no_grad():
        right = model(x, t).sample
    ours = dict(zip(dtypes, ("fastdiff", "fastdiff, bfloat16"), strict=False))  # report.py divides by "fastdiff"
    calls = turns({name: accelerated(model, dtype) for dtype, name in ours.items()}, x, t, more)
    graph = openvino.convert_model(Positional(model), example_input=(x, t), input=[list(x.shape), list(t.shape)])
    for dtype in dtypes:
        calls[f"OpenVINO, {text(dtype)}"] = inferred(openvino, graph, dtype, (x, t))
    gate(calls, right, {name for name in calls if "bfloat16" in name})
    repeats = 8 if batch == 1 else 2
    contest(
        "unet, beside OpenVINO",
        "CIFAR-10",
        {name: block(call, repeats) for name, call in calls.items()},
        shape=tuple(x.shape),
        targets=[
            {"kind": "ratio", "contestant": f"OpenVINO, {text(dtype)}", "ours": ours[dtype],
             "goal": 1.0, "stretch": 1.15 if batch == 1 else 1.1 if dtype == torch.float32 else 1.5}
            for dtype in dtypes
        ],
        seconds=45,
        warm=True,
        repeats=repeats,
    )  # fmt: skip


class Positional(nn.Module):
    """A network of diffusers whose result is a tensor, as OpenVINO's converter wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, return_dict=False)[0]


def inferred(openvino: Any, graph: Any, dtype: torch.dtype, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """A call of a converted network, with as many threads as PyTorch has."""
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }
    request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()
    arrays = [t.numpy() for t in inputs]
    return lambda: torch.from_numpy(request.infer(arrays, share_inputs=True)[0])


def block(call: Callable[[], Tensor], repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            call()

    return run


def text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def targets(name: str, batch: int, bf16: bool) -> list[dict[str, Any]]:
    """Those of a CPU are for one with bfloat16, in which "fastdiff" then computes; of others, only float32's."""
    if name != "CIFAR-10":
        return []
    if GPU:
        goal = {1: 15, 64: 2.5}.get(batch)
        eager = [{"kind": "ratio", "contestant": "diffusers' default: float32", "goal": goal}] if goal else []
        return eager + [{"kind": "images", "contestant": "fastdiff", "goal": 30}] * (batch == max(CASES[name][2]))
    if batch != 8:
        return []
    ours = FLOAT32 if bf16 else "fastdiff"
    found = [
        {"kind": "ratio", "contestant": "diffusers' default: float32", "goal": 2.0, "stretch": 2.3},
        {"kind": "ratio", "contestant": "float32, channels_last", "ours": ours, "goal": 1.10},
        {"kind": "ratio", "contestant": "torch.compile, float32", "ours": ours, "goal": 1.0},
    ]
    if bf16:
        found += [
            {"kind": "ratio", "contestant": "bfloat16, channels_last", "goal": 1.15, "stretch": 1.25},
            {"kind": "ratio", "contestant": "torch.compile, bfloat16", "goal": 1.0},
        ]
    return found


@pytest.mark.skipif(GPU, reason="on a GPU a batch-invariant network is called sample by sample, whatever it costs")
@pytest.mark.parametrize(("name", "batch"), [("digits", 64), ("CIFAR-10", 1), ("CIFAR-10", 8)])
def test_batch_invariant(contest, device, diffusers, name, batch):
    """What the same bits in every batch cost, in float32."""
    model, arguments = small_or_known(name, batch, device, diffusers)
    promised = copy.deepcopy(model)
    fastdiff.accelerate(promised, dtype=torch.float32, batch_invariant=True)
    models = {"fastdiff": accelerated(model, torch.float32), "fastdiff, batch_invariant": promised, "PyTorch": model}
    calls = {key: called(model, arguments) for key, model in models.items()}
    gate(calls, calls["PyTorch"](), set())
    contest("unet, batch-invariant", name, calls, shape=tuple(arguments[0].shape), seconds=20, warm=False)


def small_or_known(name: str, batch: int, device: torch.device, diffusers: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """A network and the arguments of a call."""
    if name == "digits":
        arguments = torch.randn(batch, 1, 8, 8), torch.full((batch,), 500), torch.arange(batch) % 10
        return fastdiff.models.digits().unet.requires_grad_(False), arguments
    if diffusers is None:
        pytest.skip("diffusers is not installed")
    if name == "emoji":
        model = fastdiff.load("emoji").pipe.unet
        fastdiff.restore(model)
        return model, (torch.randn(batch, 4, 16, 16), torch.full((batch,), 500), torch.randn(batch, 16, 192))
    return network(name, device), inputs(name, batch, device)[:2]


def called(model: nn.Module, arguments: tuple[Any, ...]) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        out = model(*arguments)
        return out if isinstance(out, Tensor) else out.sample

    return call


@pytest.mark.skipif(GPU, reason="calls are replayed on a CPU")
@pytest.mark.parametrize(
    ("name", "batch"), [("digits", 1), ("digits", 2), ("digits", 16), ("emoji", 1), ("emoji", 2), ("CIFAR-10", 1)]
)
def test_replays(contest, device, diffusers, name, batch):
    """What it brings that calls are replayed without the network's Python, in float32."""
    model, arguments = small_or_known(name, batch, device, diffusers)
    models = {
        "fastdiff": accelerated(model, torch.float32),
        "fastdiff, not replayed": accelerated(model, torch.float32),
    }
    calls = {key: called(model, arguments) for key, model in (models | {"PyTorch": model}).items()}
    for call in list(calls.values())[:2] * (AFTER + 2):
        call()
    replays = [network_of(model).replays for model in models.values()]
    assert all(layout.trusted for replay in replays for layout in replay.layouts.values())
    replays[1].forget(serves=False)
    gate(calls, calls["PyTorch"](), set())
    contest("unet, replays", name, calls, shape=tuple(arguments[0].shape), seconds=15, warm=False)
    assert not replays[1].serves
    assert all(layout.trusted for layout in replays[0].layouts.values())


BLOCKS = (GroupNorm, Sequential, Resnet, Up, DiffusersUp, CrossAttentionUp, Downsample)
# The stand-ins that each part adds, and whether convolutions still are computed as they stand.
PARTS: dict[str, tuple[tuple[type[StandIn], ...], bool]] = {
    "+ packed weights": ((Conv, Linear, LayerNorm), True),
    "+ fused blocks: GroupNorm with SiLU, embedding, skip; residuals": (BLOCKS, True),
    "+ attention without layout copies": ((Attention,), True),
    **({} if GPU else {"+ 3×3 convolutions by Winograd's products": ((), False)}),
    "fastdiff": ((Upsample,), False),
}


@pytest.mark.parametrize("batch", [1, 64] if GPU else [8])
def test_ablation(contest, device, diffusers, batch):
    """From diffusers' default to the whole fast path, one part after another, in bfloat16 where that is native.

    On a GPU the graph comes before what is fastdiff's own arithmetic, which gets no credit for it.
    """
    if diffusers is None:
        pytest.skip("diffusers is not installed")
    model = network("CIFAR-10", device)
    dtype = torch.bfloat16 if computes_bfloat16(model) else torch.float32
    x, t, more = inputs("CIFAR-10", batch, device)
    models = {"diffusers' default: float32": model}
    models["+ channels_last"] = formed(model, torch.float32, torch.channels_last)
    if dtype != torch.float32:
        models[f"+ {text(dtype)}"] = formed(model, dtype, torch.channels_last)
    eager = list(models)
    kinds: tuple[type[StandIn], ...] = ()
    for name, (parts, exact) in PARTS.items():
        kinds += parts
        models[name] = copy.deepcopy(model)
        install(models[name], dtype, exact, {known: kind for known, kind in KNOWN.items() if kind in kinds})
    with torch.no_grad():
        right = model(x, t).sample
    calls = turns(models, x, t, more)
    gate(calls, right, set(models) if dtype != torch.float32 else set())
    if GPU:
        last = eager[-1]
        graphs = {name: captured(models[name], tuple(x.shape), more) for name in (last, *PARTS)}
        calls = {**{name: calls[name] for name in eager}, "+ one graph of the step": graphs.pop(last), **graphs}
    calls = dict(sorted(calls.items(), key=lambda item: item[0] != "fastdiff"))
    contest(
        "unet, part by part", "CIFAR-10", calls, shape=tuple(x.shape), seconds=3 if GPU else 40, warm=False, calls=CALLS
    )
