"""The settings of a training run, and the network and schedule that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastdiff.data import DIGITS_SIZE, FOLDER_SIZE, ImageData
from fastdiff.schedule import NoiseSchedule

# How a trained folder is sampled unless asked otherwise; training.json carries it to whoever loads the folder.
SAMPLING: dict[str, Any] = {"sampler": "ddim", "steps": 50, "eta": 1.0, "guidance_scale": 1.0, "clip": 1.0}

SCHEDULES = {"linear": NoiseSchedule.linear, "cosine": NoiseSchedule.cosine}
_DIFFUSERS_NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


@dataclass(frozen=True)
class Settings:
    """What shapes a training run.

    data: "digits" or a folder of pictures, see `fastdiff.data.load`. size: pixels a side (8 for digits, else 32).
    steps, batch_size: optimiser steps in all, and images a step, drawn with replacement.
    lr: AdamW's learning rate, reached after `warmup` steps and constant from there. seed: of weights, order and noise.
    channels: of each level, from the input's resolution down, multiples of 8; None chooses by size. layers: residual
    blocks a level. Levels after the first whose side is at most 16 have attention.
    label_dropout: the share of labels replaced by the null class (Ho & Salimans 2022, Algorithm 1).
    ema_decay: decay a step of the running average of the weights, which is what is kept.
    schedule: "linear" or "cosine". dtype: "float32", "bfloat16" (autocast), or "auto", which is bfloat16 on a GPU,
    and on a CPU with AVX512-BF16 or AMX for models of ten million parameters or more.
    device: "auto", or what torch calls it. save_every: steps between checkpoints, each with a grid of samples.

    Raises TypeError or ValueError, naming the setting, for anything else.
    """

    data: str
    size: int | None = None
    steps: int = 5000
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 200
    seed: int = 0
    channels: tuple[int, ...] | None = None
    layers: int = 1
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    schedule: str = "linear"
    dtype: str = "auto"
    device: str = "auto"
    save_every: int = 500

    def __post_init__(self) -> None:
        size = self.size
        if size is None:
            size = DIGITS_SIZE if self.data == "digits" else FOLDER_SIZE
            object.__setattr__(self, "size", size)
        for name, least in (("size", 1), ("steps", 1), ("batch_size", 1), ("warmup", 1), ("layers", 1), ("seed", 0)):
            self._check_int(name, least)
        self._check_int("save_every", 1)
        if self.seed >= 2**63:
            raise ValueError(f"seed must lie below 2**63; got {self.seed}")
        for name, low, high in (("lr", 0.0, math.inf), ("label_dropout", 0.0, 1.0), ("ema_decay", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number; got {type(value).__name__}")
            if not low <= value < high or (name == "lr" and value == 0):
                raise ValueError(f"{name} must lie in {'(' if name == 'lr' else '['}{low}, {high}); got {value}")
        for name, known in (("schedule", list(SCHEDULES)), ("dtype", ["auto", "float32", "bfloat16"])):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")

        channels = _default_channels(size) if self.channels is None else tuple(self.channels)
        if not channels or any(type(c) is not int or c < 8 or c % 8 for c in channels):
            raise ValueError(f"channels must be multiples of 8, one for each level; got {self.channels}")
        object.__setattr__(self, "channels", channels)
        if size % 2 ** (len(channels) - 1):
            raise ValueError(f"size {size} must divide by {2 ** (len(channels) - 1)} for {len(channels)} levels")

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if type(value) is not int:
            raise TypeError(f"{name} must be an int; got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def _default_channels(size: int) -> tuple[int, ...]:
    if size <= 8:
        return (32, 64)
    return (64, 128, 128) if size <= 32 else (64, 128, 128, 256)


def unet_config(settings: Settings, data: ImageData) -> dict[str, Any]:
    """The fields of the `UNet` to train: DDPM's, with a null class after the last one where there are classes."""
    size, channels = settings.size, settings.channels
    assert size is not None and channels is not None  # set by Settings
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
