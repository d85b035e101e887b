"""What a `UNet` is made of: the fields of diffusers' `UNet2DModel`, checked."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from msgspec import Meta

from fastdiff.checks import check_fields

# The bounds are far beyond any network in use: a configuration that is damaged or malicious is refused before a network
# is built that takes minutes, or more memory than there is.
Count = Annotated[int, Meta(ge=1, le=1 << 16)]
Layers = Annotated[int, Meta(ge=1, le=32)]
# Not tuple[Count, Count]: of a bounded int beside a tuple of fixed length msgspec 0.23 makes a type that crashes.
Pair = Annotated[tuple[Count, ...], Meta(min_length=2, max_length=2)]
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
MAX_LEVELS = 10
DownBlocks = Annotated[tuple[Literal["DownBlock2D", "AttnDownBlock2D"], ...], Meta(max_length=MAX_LEVELS)]
UpBlocks = Annotated[tuple[Literal["AttnUpBlock2D", "UpBlock2D"], ...], Meta(max_length=MAX_LEVELS)]
Channels = Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MAX_LEVELS)]


@dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' `UNet2DModel`, with its names and defaults, and one of our own, `null_class`.

    A field that a `config.json` leaves out means the default, so the defaults are part of the format.

    Args:
        sample_size: height and width of the training images; kept, but any size that divides is accepted.
        in_channels, out_channels: channels of the input and of the prediction.
        center_input_sample: map inputs from [0, 1] to [-1, 1].
        time_embedding_type: "positional", the sinusoidal embedding.
        time_embedding_dim: width of the time embedding; None means 4 * block_out_channels[0].
        freq_shift: the frequencies' denominator is half_dim - freq_shift; 1 in DDPM, 0 in Stable Diffusion.
        flip_sin_to_cos: cosines first; False in DDPM, True in Stable Diffusion.
        down_block_types: "DownBlock2D" or "AttnDownBlock2D" for each level, from the input's resolution down.
        mid_block_type: "UNetMidBlock2D", or None for no middle block.
        up_block_types: "UpBlock2D" or "AttnUpBlock2D" for each level, from the lowest resolution up.
        block_out_channels: channels of each level, from the input's resolution down.
        layers_per_block: residual blocks of a down block; an up block has one more.
        mid_block_scale_factor: the middle block divides each of its residual sums by this.
        downsample_padding: 1, or 0 for a zero row and column at the bottom and right only.
        downsample_type, upsample_type: "conv".
        dropout: probability, between the second activation and convolution of each residual block.
        act_fn: "silu", also called "swish".
        attention_head_dim: channels of a head. None means one head over all channels, which has weights of the same
            shapes as many heads: dropping a null when a configuration is copied yields another network, silently.
        norm_num_groups, norm_eps: groups and epsilon of every GroupNorm.
        attn_norm_num_groups: groups of the middle attention's GroupNorm; None means norm_num_groups.
        resnet_time_scale_shift: "default", the time embedding is added.
        add_attention: whether the middle block attends.
        class_embed_type: None.
        num_class_embeds: number of classes, a null class included; None means unconditional.
        num_train_timesteps: kept, but a sinusoidal embedding has no table to size.
        null_class: the class that stands for no class in classifier-free guidance (Ho & Salimans 2022), used when the
            network is called without labels; by convention the last, num_class_embeds - 1. None means there is none.

    Raises:
        ValueError: a field has a value that `UNet` does not build, named with it.
    """

    # Of some fields only some values are built. Others would often load, with weights of the right shapes, and be
    # wrong.
    sample_size: Count | Pair | None = None
    in_channels: Count = 3
    out_channels: Count = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: Count | None = None
    freq_shift: Annotated[int, Meta(ge=0)] = 0
    flip_sin_to_cos: bool = True
    down_block_types: DownBlocks = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    up_block_types: UpBlocks = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: Channels = (224, 448, 672, 896)
    layers_per_block: Layers = 2
    mid_block_scale_factor: Positive = 1
    downsample_padding: Literal[0, 1] = 1
    downsample_type: Literal["conv"] = "conv"
    upsample_type: Literal["conv"] = "conv"
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    act_fn: Literal["silu", "swish"] = "silu"
    attention_head_dim: Count | None = 8
    norm_num_groups: Count = 32
    attn_norm_num_groups: Count | None = None
    norm_eps: Positive = 1e-5
    resnet_time_scale_shift: Literal["default"] = "default"
    add_attention: bool = True
    class_embed_type: None = None
    num_class_embeds: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None
    num_train_timesteps: int | None = None
    null_class: Annotated[int, Meta(ge=0)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_levels()
        if self.null_class is not None and self.null_class >= (self.num_class_embeds or 0):
            self._refuse("null_class", f"None or one of the num_class_embeds={self.num_class_embeds} classes")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "UNetConfig":
        """Builds from a `config.json`'s fields; keys that begin with an underscore are diffusers' own notes."""
        values = {name: value for name, value in values.items() if not name.startswith("_")}
        known = {field.name for field in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{name}={value!r} is not a field of UNet2DModel")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields for a `config.json`: diffusers' own, and null_class where there is one."""
        values = asdict(self)
        if self.null_class is None:
            del values["null_class"]
        return values

    @property
    def time_embed_dim(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def downsampling(self) -> int:
        """Height and width of an input are multiples of this: every level but the last halves them."""
        return 2 ** (len(self.block_out_channels) - 1)

    def heads(self, channels: int) -> int:
        """Number of attention heads over so many channels."""
        return channels // (self.attention_head_dim or channels)

    def _check_levels(self) -> None:
        """Checks the fields that describe the levels, which must agree with each other."""
        channels = self.block_out_channels
        if any(c % self.norm_num_groups for c in channels):
            self._refuse("block_out_channels", f"multiples of norm_num_groups={self.norm_num_groups}")
        if channels[0] % 2:
            self._refuse("block_out_channels", "an even first number, half sines and half cosines")
        if self.freq_shift >= channels[0] // 2:
            self._refuse("freq_shift", f"an integer from 0 to {channels[0] // 2 - 1}, half of block_out_channels[0]")
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != len(channels):
                self._refuse(name, f"one block for each of the {len(channels)} block_out_channels")
        attended = [c for c, block in zip(channels, self.down_block_types, strict=True) if "Attn" in block]
        attended += [c for c, block in zip(channels[::-1], self.up_block_types, strict=True) if "Attn" in block]
        if self.mid_block_type and self.add_attention:
            attended.append(channels[-1])
            if channels[-1] % (self.attn_norm_num_groups or 1):
                self._refuse("attn_norm_num_groups", f"a divisor of the middle block's {channels[-1]} channels")
        if any(c % (self.attention_head_dim or c) for c in attended):
            self._refuse("attention_head_dim", f"a divisor of each of {sorted(set(attended))} channels")

    def _refuse(self, name: str, needs: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)!r} is not supported; UNet needs {needs}")
