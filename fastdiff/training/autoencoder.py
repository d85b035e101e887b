"""The first half of latent diffusion (Rombach et al. 2022, Section 3.1): a KL autoencoder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.training.folder import save_samples
from fastdiff.training.loop import Loop

# The paper's 10⁻⁶ (Section D.1) weighs sums over 3·256² values of pixels; the losses here are means.
KL_WEIGHT = 1e-7
_SHOWN = 16  # pictures, above what becomes of them


def new_autoencoder(size: int, channels: tuple[int, ...], latent_channels: int) -> Any:
    """diffusers' AutoencoderKL with untrained weights: each level after the first halves the sides."""
    from diffusers import AutoencoderKL

    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
        scaling_factor=1.0,
    )


class AutoencoderRun(Loop):
    """An autoencoder that learns to give pictures back: L1 + L2 + 10⁻⁷ KL."""

    def loss(self) -> Tensor:
        images, _ = next(self.batches)
        images = images.to(self.device)
        if self.settings.flip:
            mirrored = torch.rand(len(images), generator=self.generator) < 0.5
            images = torch.where(mirrored.to(self.device).view(-1, 1, 1, 1), images.flip(-1), images)
        drawn = torch.randn(self._latent_shape(images), generator=self.generator).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            posterior = self.model.encode(images).latent_dist  # type: ignore[operator]
            decoded = self.model.decode(posterior.mean + posterior.std * drawn).sample  # type: ignore[operator]
        difference = decoded.float() - images
        return difference.abs().mean() + difference.square().mean() + KL_WEIGHT * posterior.kl().float().mean()

    def _latent_shape(self, images: Tensor) -> tuple[int, ...]:
        config: Any = self.model.config
        shrink = 2 ** (len(config.block_out_channels) - 1)
        batch, _, height, width = images.shape
        return batch, config.latent_channels, height // shrink, width // shrink

    def write_model(self, out: Path) -> None:
        """Nothing yet: `finish` writes it, scaled."""

    def write_samples(self, out: Path) -> None:
        images, _ = self.data[torch.arange(min(_SHOWN, len(self.data)))]
        shown = torch.cat([images, reconstructed(self.average.module, images.to(self.device)).cpu()])
        save_samples(out / "samples" / f"step-{self.step:06d}.png", shown, len(images), ["picture", "decoded"])


@torch.no_grad()
def reconstructed(autoencoder: Any, images: Tensor) -> Tensor:
    """What becomes of pictures [B, 3, H, W] that are encoded, to the mean, and decoded; in [-1, 1]."""
    decoded: Tensor = autoencoder.decode(autoencoder.encode(images).latent_dist.mean).sample
    return decoded.float().clamp(-1, 1)


@torch.no_grad()
def encoded(autoencoder: Any, data: Any, *, batch_size: int = 64) -> Tensor:
    """The latents of all pictures, float32 [N, C, h, w] on the CPU: the means, not scaled."""
    device = next(autoencoder.parameters()).device
    parts = torch.arange(len(data)).split(batch_size)
    return torch.cat(
        [autoencoder.encode(data.images(part).to(device)).latent_dist.mean.float().cpu() for part in parts]
    )


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture [B, 3, H, W] in [-1, 1], in decibels: [B]."""
    return -10 * ((images.double() - truth.double()) / 2).square().flatten(1).mean(1).log10()
