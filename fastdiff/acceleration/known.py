"""Which modules of a network are known, and what stands in for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastdiff.acceleration.attention import Attention, SelfAttention
from fastdiff.acceleration.blocks import CrossAttentionUp, DiffusersUp, Downsample, Resnet, Up, Upsample
from fastdiff.acceleration.layers import Conv, GroupNorm, LayerNorm, Linear, Sequential
from fastdiff.acceleration.module import Single, StandIn, replaced_method
from fastdiff.acceleration.time_embedding import TimeEmbedding, TimeProjection

# By the exact class's full name: a subclass, or a class of that name elsewhere, may compute something else.
KNOWN: dict[str, type[StandIn]] = {
    "torch.nn.modules.conv.Conv2d": Conv,
    "torch.nn.modules.linear.Linear": Linear,
    "torch.nn.modules.normalization.GroupNorm": GroupNorm,
    "torch.nn.modules.normalization.LayerNorm": LayerNorm,
    "torch.nn.modules.container.Sequential": Sequential,
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
    "diffusers.models.unets.unet_2d_blocks.CrossAttnUpBlock2D": CrossAttentionUp,
}
# The embedding of the timestep, in networks whose own forward gives it nothing else.
TIMES: dict[str, type[StandIn]] = {
    "fastdiff.models.layers.Timesteps": TimeProjection,
    "fastdiff.models.layers.TimestepEmbedding": TimeEmbedding,
    "diffusers.models.embeddings.Timesteps": TimeProjection,
    "diffusers.models.embeddings.TimestepEmbedding": TimeEmbedding,
}
# Embeddings of what is the same in every step, or of a number a sample: small, and computed in their own dtype.
EMBEDDINGS = (
    *TIMES,
    "torch.nn.modules.sparse.Embedding",
    "diffusers.models.embeddings.TextTimeEmbedding",
)
WHOLE = (Resnet, SelfAttention, Attention, Upsample, Downsample, TimeEmbedding)  # blocks that call no layer's forward
UNETS = (
    "fastdiff.models.unet.UNet",
    "diffusers.models.unets.unet_2d.UNet2DModel",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
)
AUTOENCODERS = ("diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL",)
# Whose last GroupNorm is read by their last SiLU alone.
TAILS = (*UNETS, "diffusers.models.autoencoders.vae.Encoder", "diffusers.models.autoencoders.vae.Decoder")
PACKAGES = ("torch", "diffusers", "fastdiff")  # whose modules without weights of their own take any dtype
LAYERS = (  # that are named in the report where they are kept, as people expect them to be known
    nn.modules.conv._ConvNd, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm,
)  # fmt: skip


def name_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def inside_out(module: nn.Module) -> Iterator[nn.Module]:
    """Every module below this one, and it, once each, the inner before the outer; not what is inside an embedding."""
    seen: set[nn.Module] = set()

    def walk(m: nn.Module) -> Iterator[nn.Module]:
        if m in seen:
            return
        seen.add(m)
        if name_of(m) not in EMBEDDINGS:
            for child in m.children():
                yield from walk(child)
        yield m

    yield from walk(module)


def reason_of(module: Any, kind: type[StandIn]) -> str | None:
    """Why ``kind`` cannot stand in for a module as it is now, or None."""
    forward = module.__dict__.get("forward")
    if forward is not None and not isinstance(forward, StandIn):
        return "its forward is not its class's"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it is compiled"
    return replaced_method(module) or kind.unsupported_reason(module)


def kept_as(module: nn.Module) -> str:
    """What the report says of a layer whose class is not known."""
    package = type(module).__module__.split(".")[0]
    return "its own code" if package == "torch" else f"its own code: {name_of(module)} is not known"


def plans_embeddings(root: Any) -> bool:
    """Whether a network's time embedding is a function of the timestep alone, so that a plan's can be tabulated."""
    if name_of(root) not in UNETS:
        return False
    config = root.config
    get = config.get if hasattr(config, "get") else lambda name: getattr(config, name, None)
    if get("time_cond_proj_dim") is not None or get("class_embed_type") == "timestep":
        return False  # LCM's guidance embedding; labels that go through the timestep's projection
    return not get("class_embeddings_concat")


def is_whole(root: nn.Module, stand_ins: dict[nn.Module, StandIn]) -> bool:
    """Whether every block of a network is known, so that all of it can be computed in another dtype than its own."""
    if name_of(root) not in (*UNETS, *AUTOENCODERS):
        return False
    for m in inside_out(root):
        stand_in = stand_ins.get(m)
        if stand_in is not None and not isinstance(stand_in, Single):
            if stand_in.reason is not None:
                return False
        elif name_of(m) in EMBEDDINGS:
            continue
        elif (
            any(True for _ in m.parameters(recurse=False))
            or name_of(m).split(".")[0] not in PACKAGES
            or m.__dict__.get("forward") is not stand_in
            or getattr(m, "_compiled_call_impl", None) is not None
        ):
            return False
    return True
