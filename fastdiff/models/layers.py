"""The layers of a `UNet`, under the attribute names of diffusers' checkpoints.

Shapes: B samples, C channels, H × W pixels, D the width of the time embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig


class Timesteps(nn.Module):
    """Sinusoidal embedding of t (Vaswani et al. 2017, Section 3.5), in float32: [B] -> [B, dim]."""

    def __init__(self, dim: int, flip_sin_to_cos: bool, freq_shift: int) -> None:
        super().__init__()
        self.dim, self.flip_sin_to_cos, self.freq_shift = dim, flip_sin_to_cos, freq_shift

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.dim // 2
        i = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * i / (half - self.freq_shift))
        sin, cos = angles.sin(), angles.cos()
        return torch.cat([cos, sin] if self.flip_sin_to_cos else [sin, cos], dim=1)


class TimestepEmbedding(nn.Module):
    """Two linear layers: [B, in_dim] -> [B, D]."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, the time embedding added between; x [B, in_channels, H, W], temb [B, D]."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, scale_factor: float = 1.0) -> None:
        super().__init__()
        self.output_scale_factor = scale_factor
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_embed_dim, out_channels)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return _scaled(x + h, self.output_scale_factor)


class Attention(nn.Module):
    """Self-attention over the pixels of x [B, C, H, W], with a residual connection."""

    def __init__(self, channels: int, config: UNetConfig, num_groups: int, scale_factor: float = 1.0) -> None:
        super().__init__()
        self.heads = config.heads(channels)
        self.rescale_output_factor = scale_factor
        self.group_norm = nn.GroupNorm(num_groups, channels, config.norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # a sequence of one, for its name to_out.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (to(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B, heads, HW, C / heads]
        h = self.to_out(h.transpose(1, 2).flatten(2))
        return _scaled(x + h.transpose(1, 2).unflatten(2, x.shape[2:]), self.rescale_output_factor)


class Downsample(nn.Module):
    """A convolution with stride 2: [B, C, H, W] -> [B, C, H / 2, W / 2]."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        # DDPM was written in TensorFlow, whose "same" padding for stride 2 lies at the right and bottom only.
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution: [B, C, H, W] -> [B, C, 2 H, 2 W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def attentions(count: int, channels: int, attend: bool, config: UNetConfig) -> nn.ModuleList:
    """One attention after each residual block of a level, or nothing after each."""
    groups = config.norm_num_groups
    return nn.ModuleList(Attention(channels, config, groups) if attend else nn.Identity() for _ in range(count))


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x / factor  # dividing by one would be a pass over memory for nothing
