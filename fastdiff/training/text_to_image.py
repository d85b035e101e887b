"""The second half of latent diffusion (Rombach et al. 2022, Section 3.2 f.): a UNet of latents that obeys captions."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.acceleration.worthwhile import accelerated
from fastdiff.ops.add_noise import add_noise
from fastdiff.sampling.sample import sample
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.training.folder import save_samples
from fastdiff.training.loop import Loop
from fastdiff.training.settings import RunSettings

_SHOWN = 8  # captions in a grid of samples, with as many columns


class Reader(nn.Module):
    """A UNet and the text encoder that is trained with it; ``forward(latents, timesteps, tokens)`` predicts."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        predicted: Tensor = self.unet(latents, timesteps, self.text_encoder(tokens)[0]).sample
        return predicted


@dataclass(frozen=True, eq=False)
class Latents:
    """Encoded pictures with their captions.

    values: float32 [N, C, h, w], of unit variance. tokens: int64 [M, L], every wording of every caption.
    first, wordings: int64 [N]: where a picture's wordings begin, and how many there are.
    fingerprint_: the pictures' and captions'.
    """

    values: Tensor
    tokens: Tensor
    first: Tensor
    wordings: Tensor
    fingerprint_: str

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture's latents."""
        return tuple(self.values.shape[1:])

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of an int64 index [n], and that index."""
        return self.values[index], index

    def fingerprint(self) -> str:
        return self.fingerprint_


def new_unet(size: int, channels: tuple[int, ...], layers: int, latent_channels: int, width: int) -> Any:
    """diffusers' UNet2DConditionModel of random weights: cross-attention on every level but the first."""
    from diffusers import UNet2DConditionModel

    down = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(channels) - 1)
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=down,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        block_out_channels=channels,
        layers_per_block=layers,
        attention_head_dim=tuple(max(1, c // 32) for c in channels),  # the number of heads, whatever its name
        cross_attention_dim=width,
        norm_num_groups=16,
    )


class TextRun(Loop):
    """A `Reader` that learns to predict what noised latents hold, given their captions.

    schedule: of the noise. autoencoder, scale: what makes pictures of latents / scale. empty: the tokens of no words.
    shown: captions of the grids, with the rows of their tokens.
    """

    def __init__(
        self,
        model: Reader,
        data: Latents,
        schedule: NoiseSchedule,
        settings: RunSettings,
        out: Path | None,
        *,
        empty: Tensor,
        autoencoder: Any,
        scale: float,
        shown: dict[str, int],
        **options: Any,
    ) -> None:
        self.schedule, self.empty, self.autoencoder, self.scale, self.shown = schedule, empty, autoencoder, scale, shown
        super().__init__(model, data, settings, out, **options)  # type: ignore[arg-type]

    def identity(self) -> dict[str, Tensor]:
        return {"alphas_cumprod": self.schedule.alphas_cumprod}

    def record(self) -> dict[str, Any]:
        return {"scaling_factor": self.scale}

    def loss(self) -> Tensor:
        """Algorithm 1 of Ho et al. (2020) on latents: the mean square of what is predicted less what it should be."""
        latents, tokens, condition = self.examples()
        noised, timesteps, target = self.noised(latents)
        given = noised if condition is None else torch.cat([noised, condition], 1)
        # The fused attention's backward on CPUs takes longer than the plain one's at a few hundred tokens.
        plain = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        with plain, torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            predicted = self.model(given, timesteps, tokens)
            return F.mse_loss(predicted.float(), target)

    def examples(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The next batch: latents [B, C, h, w], a wording's tokens [B, L] for each, some dropped (Ho & Salimans 2022,
        Algorithm 1), and what else the UNet is given [B, C', h, w], or None; on the device.
        """
        latents, index = next(self.batches)
        data: Any = self.data
        drawn = torch.rand(len(index), generator=self.generator)
        tokens = data.tokens[data.first[index] + (drawn * data.wordings[index]).long()]
        dropped = torch.rand(len(index), generator=self.generator) < self.settings.label_dropout
        return latents.to(self.device), torch.where(dropped[:, None], self.empty, tokens).to(self.device), None

    def noised(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents with noise, their timesteps [B], and what the network is to predict [B, C, h, w]."""
        timesteps = self.timesteps(len(latents)).to(self.device)
        noised, noise = add_noise(latents, timesteps, self.schedule, seed=self.settings.seed, draw=self.step)
        if self.settings.prediction == "epsilon":
            return noised, timesteps, noise
        if self.settings.prediction == "sample":
            return noised, timesteps, latents
        alpha = self.schedule.alphas.to(latents)[timesteps].view(-1, 1, 1, 1)
        sigma = self.schedule.sigmas.to(latents)[timesteps].view(-1, 1, 1, 1)
        return noised, timesteps, alpha * noise - sigma * latents

    def timesteps(self, count: int) -> Tensor:
        """Of the examples, int64 [count]."""
        return torch.randint(len(self.schedule), (count,), generator=self.generator)

    def write_model(self, out: Path) -> None:
        """Nothing yet: the pipeline is written at the end, and the checkpoint keeps the averaged weights until then."""

    def write_samples(self, out: Path) -> None:
        """A row for each of a few captions, the same noise each time, with the scale of guidance that is usual here."""
        reader: Any = self.average.module
        data: Any = self.data
        tokens = data.tokens[list(self.shown.values())]
        with torch.no_grad():
            words = reader.text_encoder(tokens.to(self.device))[0].repeat_interleave(_SHOWN, 0)
            nothing = reader.text_encoder(self.empty.view(1, -1).to(self.device))[0].expand_as(words)
            with accelerated(reader.unet):
                latents = sample(
                    reader.unet, (len(words), *data.shape), schedule=self.schedule, sampler="dpmpp_2m", steps=20,
                    prediction=self.settings.prediction, guidance_scale=3.0, seed=self.settings.seed,
                    model_kwargs={"encoder_hidden_states": words}, uncond_kwargs={"encoder_hidden_states": nothing},
                )  # fmt: skip
            images = decoded(self.autoencoder, latents / self.scale)
        save_samples(out / "samples" / f"step-{self.step:06d}.png", images.cpu(), _SHOWN, list(self.shown))


@torch.no_grad()
def decoded(autoencoder: Any, latents: Tensor, *, batch_size: int = 32) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] of latents that are not scaled."""
    return torch.cat([autoencoder.decode(part).sample.float().clamp(-1, 1) for part in latents.split(batch_size)])
