"""Which modules of a network are known, what stands in for each, and why one was left alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

from torch import nn

from fastdiff.acceleration.attention import Attention, SelfAttention
from fastdiff.acceleration.blocks import DiffusersUp, Downsample, Resnet, Up, Upsample
from fastdiff.acceleration.convolutions import Conv
from fastdiff.acceleration.layers import Foreign, GroupNorm, LayerNorm, Linear, Passed
from fastdiff.acceleration.module import Context, Fast, fast_of, hooked
from fastdiff.acceleration.time_embedding import TimeEmbedding, TimeProjection

# By exact class: a subclass may compute something else.
LEAVES: dict[str, type[Fast]] = {
    "torch.nn.modules.conv.Conv2d": Conv,
    "torch.nn.modules.linear.Linear": Linear,
    "torch.nn.modules.normalization.GroupNorm": GroupNorm,
    "torch.nn.modules.normalization.LayerNorm": LayerNorm,
}
BLOCKS: dict[str, type[Fast]] = {
    "fastdiff.models.layers.ResnetBlock": Resnet,
    "fastdiff.models.layers.Attention": SelfAttention,
    "fastdiff.models.layers.Downsample": Downsample,
    "fastdiff.models.layers.Upsample": Upsample,
    "fastdiff.models.unet.UpBlock": Up,
    "diffusers.models.resnet.ResnetBlock2D": Resnet,
    "diffusers.models.attention_processor.Attention": Attention,
    "diffusers.models.downsampling.Downsample2D": Downsample,
    "diffusers.models.upsampling.Upsample2D": Upsample,
    "diffusers.models.unets.unet_2d_blocks.UpBlock2D": DiffusersUp,
    "diffusers.models.unets.unet_2d_blocks.AttnUpBlock2D": DiffusersUp,
    "diffusers.models.unets.unet_2d_blocks.CrossAttnUpBlock2D": DiffusersUp,
}
KINDS = frozenset({*LEAVES.values(), *BLOCKS.values()})
WHOLE = (Resnet, SelfAttention, Attention, Upsample, TimeEmbedding)  # blocks that call no layer's forward
UNETS = (
    "fastdiff.models.unet.UNet",
    "diffusers.models.unets.unet_2d.UNet2DModel",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
)
# Whose last GroupNorm is read by their last SiLU alone.
TAILS = (*UNETS, "diffusers.models.autoencoders.vae.Encoder", "diffusers.models.autoencoders.vae.Decoder")
TIMES: dict[str, type[Fast]] = {
    "fastdiff.models.layers.Timesteps": TimeProjection,
    "fastdiff.models.layers.TimestepEmbedding": TimeEmbedding,
    "diffusers.models.embeddings.Timesteps": TimeProjection,
    "diffusers.models.embeddings.TimestepEmbedding": TimeEmbedding,
}
# Embeddings of what is the same in every step: small, and float32 serves every dtype of the rest.
KEPT = ("TimestepEmbedding", "Timesteps", "Embedding", "TextTimeEmbedding", "TimestepEmbedSequential")


def name_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def replacements(
    root: nn.Module, context: Context, kinds: Collection[type[Fast]]
) -> tuple[dict[nn.Module, Fast], list[tuple[nn.Module, str]]]:
    """Put a stand-in on every module of ``root`` that is known: (what was put where, what was left alone and why)."""
    made: dict[nn.Module, Fast] = {}
    kept: list[tuple[nn.Module, str]] = []

    def put(module: nn.Module, fast: Fast) -> None:
        module.__dict__["forward"] = made[module] = fast

    for module in _inside_out(root):
        kind = LEAVES.get(name_of(module)) or BLOCKS.get(name_of(module))
        if module in made or kind is None or kind not in kinds:
            continue
        reason = "its forward is not its class's" if "forward" in module.__dict__ else kind.refuses(module)
        if reason is not None:
            kept.append((module, reason))
        else:
            put(module, kind(module, context))
    if name_of(root) in UNETS:
        for module in (root.get_submodule("time_proj"), root.get_submodule("time_embedding")):
            kind = TIMES.get(name_of(module))
            if kind is not None and "forward" not in module.__dict__:
                put(module, kind(module, context))
    for norm, act in _pairs(root):
        fast = fast_of(norm, GroupNorm)
        if fast is not None and not hooked(norm, act) and act not in made:
            fast.silu = True
            put(act, Passed(act, context))
    for module in _inside_out(root):
        if module in made or type(module).__name__ in KEPT or "forward" in module.__dict__:
            continue
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if own and own[0].dtype != context.dtype:
            put(module, Foreign(module, context))
    return made, kept


def _inside_out(module: nn.Module) -> Iterator[nn.Module]:
    """Every module below this one, and it, the inner before the outer; not what is inside a kept embedding."""
    seen: set[nn.Module] = set()

    def walk(m: nn.Module) -> Iterator[nn.Module]:
        if m in seen or type(m).__name__ in KEPT:
            return
        seen.add(m)
        for child in m.children():
            yield from walk(child)
        yield m

    yield from walk(module)


def _pairs(root: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A GroupNorm and the SiLU that alone reads it: in a Sequential, and at the end of UNets and decoders."""
    owners: dict[nn.Module, int] = {}
    for module in root.modules():
        for child in module._modules.values():
            if child is not None:
                owners[child] = owners.get(child, 0) + 1
    for module in root.modules():
        couples: list[tuple[Any, Any]] = []
        if type(module) is nn.Sequential:
            layers = list(module)
            couples = list(pairwise(layers))
        elif name_of(module) in TAILS:
            couples = [(module.conv_norm_out, module.conv_act)]
        for norm, act in couples:
            if type(norm) is nn.GroupNorm and type(act) is nn.SiLU and owners[norm] == owners[act] == 1:
                yield norm, act
