"""The settings of a training run, and the network and schedule that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.training.data import DIGITS_SIZE, FOLDER_SIZE, ImageData

# How a trained folder is sampled unless asked otherwise; training.json carries it to whoever loads the folder.
SAMPLING: dict[str, Any] = {"sampler": "ddim", "steps": 50, "eta": 0.0, "guidance_scale": 1.15, "clip": 1.0}

SCHEDULES = {"linear": NoiseSchedule.linear, "cosine": NoiseSchedule.cosine}
_DIFFUSERS_NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """What shapes a training run.

    Args:
        data: "digits", or a folder of pictures; see `fastdiff.training.data.load`.
        size: pixels a side; None means 8 for digits, 32 for a folder.
        steps: optimiser steps in all.
        batch_size: images a step, drawn with replacement.
        lr: AdamW's learning rate, constant once `warmup` steps have led up to it.
        seed: of the first weights, the images drawn and the noise; 0 <= seed < 2**63.
        channels: of each level, from the input's resolution down, multiples of 8; None chooses by size. Levels after
            the first whose side is at most 16 pixels have attention.
        layers: residual blocks of a level.
        label_dropout: share of labels replaced by the null class (Ho & Salimans 2022, Algorithm 1).
        ema_decay: decay a step of the running average of the weights; the average is what is kept.
        schedule: "linear" or "cosine", T = 1000.
        dtype: "float32", "bfloat16" (autocast), or "auto": bfloat16 on a GPU that computes in it, float32 elsewhere.
        device: what torch calls it, or "auto": the GPU where there is one.
        save_every: steps between checkpoints, each with a grid of samples.

    Raises:
        TypeError, ValueError: a setting, which is named, has another type or value.
    """

    data: str
    size: int | None = None
    steps: int = 6000
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 200
    seed: int = 0
    channels: tuple[int, ...] | None = None
    layers: int = 1
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    schedule: str = "cosine"
    dtype: str = "auto"
    device: str = "auto"
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup", "layers", "save_every"):
            _check_int(name, getattr(self, name), 1)
        _check_int("seed", self.seed, 0)
        if self.size is not None:
            _check_int("size", self.size, 1)
        if self.seed >= 2**63:
            raise ValueError(f"seed must lie below 2**63; got {self.seed}")
        for name in ("lr", "label_dropout", "ema_decay"):
            value = getattr(self, name)
            if type(value) not in (int, float):
                raise TypeError(f"{name} must be a number; got {type(value).__name__}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive; got {self.lr}")
        for name in ("label_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}")
        for name, known in (("schedule", SCHEDULES), ("dtype", _DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if not isinstance(self.device, str):
            raise TypeError(f"device must be a str; got {type(self.device).__name__}")
        if self.channels is not None:
            if not self.channels or any(type(c) is not int or c < 8 or c % 8 for c in self.channels):
                raise ValueError(f"channels must be multiples of 8, one for each level; got {self.channels}")
            object.__setattr__(self, "channels", tuple(self.channels))
        halvings = len(self.level_channels) - 1
        if self.image_size % 2**halvings:
            raise ValueError(f"size {self.image_size} must divide by {2**halvings} for {halvings + 1} levels")

    @property
    def image_size(self) -> int:
        """`size`, or what None means for these data."""
        if self.size is not None:
            return self.size
        return DIGITS_SIZE if self.data == "digits" else FOLDER_SIZE

    @property
    def level_channels(self) -> tuple[int, ...]:
        """`channels`, or what None means for this size."""
        if self.channels is not None:
            return self.channels
        if self.image_size <= 8:
            return (32, 64)
        return (64, 128, 128) if self.image_size <= 32 else (64, 128, 128, 256)


def _check_int(name: str, value: object, least: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def unet_config(settings: Settings, data: ImageData) -> dict[str, Any]:
    """The fields of the `UNet` to train: DDPM's, with a null class after the last one where there are classes."""
    size, channels = settings.image_size, settings.level_channels
    attends = [level > 0 and size // 2**level <= 16 for level in range(len(channels))]
    classes = len(data.classes)
    return {
        "sample_size": size,
        "in_channels": data.pixels.shape[1],
        "out_channels": data.pixels.shape[1],
        "block_out_channels": channels,
        "layers_per_block": settings.layers,
        "down_block_types": tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        "up_block_types": tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        "attention_head_dim": None,  # one head
        "norm_num_groups": 8,
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "num_class_embeds": classes + 1 if classes else None,
        "null_class": classes or None,
    }


def scheduler_config(schedule: str) -> dict[str, Any]:
    """scheduler_config.json: what diffusers' DDPMScheduler, and `NoiseSchedule.from_diffusers`, read."""
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(SCHEDULES[schedule]()),
        "beta_schedule": _DIFFUSERS_NAMES[schedule],
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",
        "clip_sample": True,
        "clip_sample_range": SAMPLING["clip"],
    }


def resolve_device(name: str) -> torch.device:
    """The device that `Settings.device` names; ValueError where torch cannot use it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises each of these, by name and by build
        raise ValueError(f"device {name!r} cannot be used: {error}") from error


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `Settings.dtype` means on a device."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.float32  # bfloat16 took 1.6 times as long, at 0.7 and at 18 million parameters, with AVX512-BF16
