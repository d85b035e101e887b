"""Algorithm 1 of Ho, Jain & Abbeel (2020) on any network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models import UNet
from fastdiff.ops.add_noise import add_noise
from fastdiff.sampling.model import first_tensor
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.training.data import Data
from fastdiff.training.folder import write_json
from fastdiff.training.keep import write_samples
from fastdiff.training.loop import Loop
from fastdiff.training.settings import RunSettings, scheduler_config


class Run(Loop):
    """A network that learns to predict the noise in noised data.

    Args (beside `Loop`'s):
        model: model(x_t, t) predicts what ``settings.prediction`` says.
        sampling: how the model is sampled unless asked otherwise, for training.json.
        label_name: the keyword that takes a batch's labels; None: there are none.
        null_class: the label that stands for none; None: labels are never dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        schedule: NoiseSchedule,
        settings: RunSettings,
        out: Path | None,
        *,
        sampling: dict[str, Any],
        label_name: str | None,
        null_class: int | None,
        device: torch.device,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.schedule, self.sampling, self.label_name, self.null_class = schedule, sampling, label_name, null_class
        super().__init__(model, data, settings, out, device=device, resume=resume, overwrite=overwrite)

    def identity(self) -> dict[str, Tensor]:
        return {"alphas_cumprod": self.schedule.alphas_cumprod}

    def record(self) -> dict[str, Any]:
        return {"classes": self.data.classes if self.label_name is not None else (), "sampling": self.sampling}

    def write_model(self, out: Path) -> None:
        super().write_model(out)
        if isinstance(self.average.module, UNet):
            write_json(out / "scheduler_config.json", scheduler_config(self.schedule, self.settings.prediction))

    def write_samples(self, out: Path) -> None:
        write_samples(self, out)

    def loss(self) -> Tensor:
        """Algorithm 1's.

        The noise is keyed by (seed, place in the batch, step), so the generator's state is all there is to keep.
        """
        settings, batch, device = self.settings, self.settings.batch_size, self.device
        images, labels = next(self.batches)
        timesteps = torch.randint(len(self.schedule), (batch,), generator=self.generator).to(device)
        dropped = torch.rand(batch, generator=self.generator) < settings.label_dropout
        if settings.flip:
            mirrored = torch.rand(batch, generator=self.generator) < 0.5
            images = torch.where(mirrored.view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)
        given = {}
        if self.label_name is not None and labels is not None:
            if self.null_class is not None:
                rows = dropped.view(-1, *[1] * (labels.ndim - 1))
                labels = torch.where(rows, self.null_class, labels)
            given[self.label_name] = labels.to(device)
        images = images.to(device)
        x_t, noise = add_noise(images, timesteps, self.schedule, seed=settings.seed, draw=self.step)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out = self.model(x_t, timesteps, **given)
        predicted = out if isinstance(out, Tensor) else first_tensor(out)
        if predicted.shape != x_t.shape:
            raise ValueError(
                f"model must return {list(x_t.shape)}, the shape of its input; got {list(predicted.shape)}"
            )
        if not predicted.requires_grad:
            raise ValueError(
                "model's output has no gradient: it must be computed from the parameters, without detach() and outside "
                "of torch.inference_mode()"
            )
        return F.mse_loss(predicted.float(), self._target(images, noise, timesteps))

    def _target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to predict."""
        if self.settings.prediction == "epsilon":
            return noise
        if self.settings.prediction == "sample":
            return images
        shape = (-1, *[1] * (images.ndim - 1))
        alpha = self.schedule.alphas.to(images)[timesteps].view(shape)
        sigma = self.schedule.sigmas.to(images)[timesteps].view(shape)
        return alpha * noise - sigma * images
