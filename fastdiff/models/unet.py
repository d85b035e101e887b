"""The UNet of "Denoising Diffusion Probabilistic Models" (Ho, Jain & Abbeel 2020, arXiv:2006.11239, Appendix B).

Residual blocks at a falling, then rising resolution, joined by skip connections, with self-attention at some levels.
Weights have the names and shapes of diffusers' `UNet2DModel`, so its checkpoints load here and ours load there.

Shapes: B samples, C channels, H × W pixels, D = 4 * block_out_channels[0] the width of the time embedding.
"""

import os
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .config import UNetConfig
from .layers import Attention, Downsample, ResnetBlock, TimestepEmbedding, Timesteps, Upsample, attentions


class DownBlock(nn.Module):
    """One level on the way down; returns x and every intermediate x that an up block will read."""

    def __init__(self, in_channels: int, out_channels: int, attend: bool, downsample: bool, config: UNetConfig) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, out_channels, config) for c in inputs)
        self.attentions = attentions(len(inputs), out_channels, attend, config)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, config.downsample_padding)] if downsample else [])

    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, temb))
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        factor = config.mid_block_scale_factor
        groups = config.attn_norm_num_groups or config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, config, factor) for _ in range(2))
        self.attentions = nn.ModuleList(
            [Attention(channels, config, groups, factor) if config.add_attention else nn.Identity()]
        )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, temb)), temb)


class UpBlock(nn.Module):
    """One level on the way up: each residual block reads x and one skip, of skip_channels, side by side."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        attend: bool,
        upsample: bool,
        config: UNetConfig,
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            ResnetBlock(c + skip, out_channels, config) for c, skip in zip(inputs, skip_channels, strict=True)
        )
        self.attentions = attentions(len(inputs), out_channels, attend, config)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        for resnet, attention, skip in zip(self.resnets, self.attentions, skips, strict=True):
            x = attention(resnet(torch.cat([x, skip], dim=1), temb))
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class UNet(nn.Module):
    """The DDPM UNet: predicts the noise in x_t, or whatever it was trained to predict.

    Weights start as torch's layers leave them, as in diffusers. (DDPM's own code starts the last convolution of every
    residual block, and of the network, at zero.)

    Args:
        **fields: the fields of diffusers' `UNet2DModel`, see `UNetConfig`; kept as `config`.

    Raises:
        ValueError: a field has a value that is not supported.
        TypeError: there is no such field.
    """

    name_or_path: str | None = None  # the folder that it was loaded from, as it was given

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = UNetConfig(**fields)
        channels = config.block_out_channels
        levels = len(channels)

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_proj = Timesteps(channels[0], config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(channels[0], config.time_embed_dim)
        classes = config.num_class_embeds
        self.class_embedding = nn.Embedding(classes, config.time_embed_dim) if classes is not None else None

        skips = [channels[0]]  # channels of every tensor that the way down leaves for the way up
        self.down_blocks = nn.ModuleList()
        for level, (kind, out) in enumerate(zip(config.down_block_types, channels, strict=True)):
            downsample = level < levels - 1
            self.down_blocks.append(DownBlock(skips[-1], out, "Attn" in kind, downsample, config))
            skips += [out] * (config.layers_per_block + downsample)

        self.mid_block = MidBlock(channels[-1], config) if config.mid_block_type else None

        self.up_blocks = nn.ModuleList()
        current = channels[-1]
        for level, (up_type, out) in enumerate(zip(config.up_block_types, reversed(channels), strict=True)):
            read = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(current, read, out, "Attn" in up_type, level < levels - 1, config))
            current = out

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "UNet":
        """Loads a folder that `save_pretrained` or diffusers wrote, or a pipeline's folder with a `unet` in it.

        Weights come from `diffusion_pytorch_model.safetensors`, else `.bin` (`weights_only=True`), onto the CPU, in the
        dtype that they are stored in. The model is in eval mode.

        Raises:
            FileNotFoundError: the folder or a file in it is missing.
            ValueError: a file is damaged, the configuration is not supported, or the weights do not fit it.
        """
        config_path, weights_path = checkpoint.find(folder)
        fields = checkpoint.read_config(config_path)
        try:
            config = UNetConfig.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{config_path}: {error}") from error
        state = checkpoint.read_weights(weights_path)
        with torch.device("meta"):  # no time for initial weights that are overwritten at once
            model = cls(**vars(config))
        checkpoint.check_weights(state, model.state_dict(), weights_path)
        model = model.to(next(iter(state.values())).dtype).to_empty(device="cpu")
        model.load_state_dict(state)
        model.name_or_path = os.fspath(folder)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `diffusion_pytorch_model.safetensors` for `from_pretrained` and for diffusers.

        A save that is interrupted leaves each file either as it was or as it was to become, never in part.
        """
        checkpoint.write(folder, self.config.to_dict(), self.state_dict())

    @property
    def null_class(self) -> int | None:
        """The class that stands for no class, which an absent `class_labels` means; None if there is none."""
        return self.config.null_class

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.conv_in.weight.device

    def forward(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Predicts the noise in `sample` at `timestep`.

        Args:
            sample: [B, in_channels, H, W] in the weights' dtype, any memory format; H and W divide by
                2 ** (levels - 1).
            timestep: a number, a tensor with no dimension or [B]. Fractions count; the embedding is taken in float32.
            class_labels: [B] int64 or int32, for a network with `num_class_embeds`. None means the null class.

        Returns:
            [B, out_channels, H, W] in the weights' dtype.

        Raises:
            ValueError: a shape, device or label does not fit.
            TypeError: a dtype does not fit.
        """
        self._check_sample(sample)
        temb = self._embed(sample, timestep, class_labels)
        x = self.conv_in(2 * sample - 1 if self.config.center_input_sample else sample)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, temb)
            skips += more
        if self.mid_block is not None:
            x = self.mid_block(x, temb)
        for block in self.up_blocks:
            x = block(x, [skips.pop() for _ in range(self.config.layers_per_block + 1)], temb)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))

    def _embed(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None) -> Tensor:
        """The time's embedding plus the class's: [B, D]."""
        timesteps = self._timesteps(sample, timestep)
        labels = self._class_labels(sample, class_labels)
        temb = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        if self.class_embedding is None or labels is None:
            return temb
        try:
            return temb + self.class_embedding(labels)
        except IndexError:  # on a CPU; on a GPU a look at labels would wait for the device, and its own check remains
            low, high, last = int(labels.min()), int(labels.max()), self.class_embedding.num_embeddings - 1
            raise ValueError(f"class_labels range from {low} to {high}; the network has classes 0 to {last}") from None

    def _check_sample(self, sample: Tensor) -> None:
        channels, step = self.config.in_channels, self.config.downsampling
        if not isinstance(sample, Tensor):
            raise TypeError(f"sample is a {type(sample).__name__}; it needs to be a tensor")
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample has shape {list(sample.shape)}; it needs [B, {channels}, H, W]")
        if not all(size > 0 and size % step == 0 for size in sample.shape[2:]):
            raise ValueError(f"sample has shape {list(sample.shape)}; its height and width need to divide by {step}")
        if self.device not in (sample.device, torch.device("meta")):  # an offloading hook has them there between calls
            raise ValueError(f"sample is on {sample.device}, the weights on {self.device}")
        if sample.dtype != self.dtype and not torch.is_autocast_enabled(sample.device.type):
            raise TypeError(f"sample is {sample.dtype}, the weights {self.dtype}")

    def _timesteps(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """The timestep of each sample: [B]."""
        batch, device = sample.shape[0], sample.device
        if not isinstance(timestep, Tensor):
            if not isinstance(timestep, Real) or isinstance(timestep, bool):
                raise TypeError(f"timestep is a {type(timestep).__name__}; it needs to be a number or a tensor")
            return torch.full((batch,), float(timestep), dtype=torch.float32, device=device)
        if timestep.dtype == torch.bool or timestep.is_complex():
            raise TypeError(f"timestep is {timestep.dtype}; it needs an integer or floating-point dtype")
        if timestep.ndim == 0:
            return timestep.to(device).expand(batch)  # schedules are often kept on the CPU
        if timestep.shape != (batch,):
            raise ValueError(
                f"timestep has shape {list(timestep.shape)}; it needs [] or [{batch}], one for each sample"
            )
        if timestep.device != device:
            raise ValueError(f"timestep is on {timestep.device}, sample on {device}")
        return timestep

    def _class_labels(self, sample: Tensor, labels: Tensor | None) -> Tensor | None:
        """The class of each sample, [B], or None for a network without classes."""
        batch, device, classes = sample.shape[0], sample.device, self.config.num_class_embeds
        if classes is None:
            if labels is not None:
                raise ValueError("class_labels given to a network without classes (num_class_embeds is None)")
            return None
        if labels is None:
            if self.null_class is None:
                raise ValueError(f"class_labels needed: the network has {classes} classes and none is the null_class")
            return torch.full((batch,), self.null_class, dtype=torch.long, device=device)
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
            got = labels.dtype if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise TypeError(f"class_labels is {got}; it needs to be an int64 or int32 tensor")
        if labels.shape != (batch,):
            raise ValueError(f"class_labels has shape {list(labels.shape)}; it needs [{batch}], one for each sample")
        if labels.device != device:
            raise ValueError(f"class_labels is on {labels.device}, sample on {device}")
        return labels
