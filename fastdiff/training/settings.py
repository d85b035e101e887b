"""The settings of a training run, and the network, the schedule and the way of sampling that follow from them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta

from fastdiff.checks import check_choice, check_fields
from fastdiff.models.config import Layers
from fastdiff.plan.plan import Plan
from fastdiff.samplers import SAMPLERS
from fastdiff.samplers.resolve import resolve_plan
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.training.data import DIGITS_SIZE, FOLDER_SIZE, ImageData

# How a model is sampled unless asked otherwise; training.json carries it to whoever loads the folder. Digits have what
# was measured for them (examples/digits_quality.py); pictures have Algorithm 2 of Ho et al. (2020), every timestep.
DIGITS_SAMPLING: dict[str, Any] = {"sampler": "ddim", "steps": 50, "eta": 0.0, "guidance_scale": 1.15, "clip": 1.0}
FOLDER_SAMPLING: dict[str, Any] = {"sampler": "ddpm", "clip": 1.0}

SCHEDULES = {"linear": NoiseSchedule.linear, "cosine": NoiseSchedule.cosine}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
_DIFFUSERS_NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}

Count = Annotated[int, Meta(ge=1, le=1 << 40)]
LevelChannels = Annotated[int, Meta(ge=8, multiple_of=8)]
Share = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What shapes the training of any network.

    Args:
        steps: optimiser steps in all.
        batch_size: images a step, drawn with replacement.
        lr: AdamW's learning rate, constant once `warmup` steps have led up to it, until `cooldown`.
        cooldown: share of the steps, the last ones, over which the rate falls to nothing in a line.
        seed: of the first weights, the images drawn and the noise; 0 <= seed < 2**63.
        label_dropout: share of labels replaced by the null class (Ho & Salimans 2022, Algorithm 1).
        ema_decay: decay a step of the running average of the weights; the average is what is kept.
        prediction: what the network learns: "epsilon", the noise; "v_prediction", √ᾱ ε − √(1 − ᾱ) x_0 (Salimans & Ho
            2022, Section 4); "sample", x_0.
        flip: mirror each drawn image left to right with probability ½.
        dtype: "float32", "bfloat16" (autocast), or "auto": bfloat16 on a GPU that computes in it, float32 elsewhere.
        device: what torch calls it, or "auto": the GPU where there is one.
        save_every: steps between checkpoints, each with a grid of samples.

    Raises:
        TypeError, ValueError: a setting, which is named, has another type or value.
    """

    steps: Count = 6000
    batch_size: Count = 64
    lr: Annotated[float, Meta(gt=0, le=sys.float_info.max)] = 2e-4
    warmup: Count = 200
    cooldown: Share = 0.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    label_dropout: Share = 0.1
    ema_decay: Share = 0.999
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    flip: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    save_every: Count = 500

    def __post_init__(self) -> None:
        check_fields(self, mismatch=TypeError)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step as a part of `lr`."""
        rate = min(1.0, (step + 1) / self.warmup)
        return min(rate, (self.steps - step) / (self.cooldown * self.steps)) if self.cooldown else rate


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """What shapes the training of a UNet that is built for the data; beside `RunSettings`:

    Args:
        data: "digits", or a folder of pictures; see `fastdiff.training.data.load`.
        size: pixels a side; None means 8 for digits, 32 for a folder.
        channels: of each level, from the input's resolution down, multiples of 8; None chooses by size. Levels after
            the first whose side is at most 16 pixels have attention.
        layers: residual blocks of a level.
        schedule: "linear" or "cosine"; timesteps: T.
        init: a folder of `fastdiff train` or diffusers whose UNet's weights are the first ones, and whose size,
            channels and layers are this network's; None draws the first weights.
        sampler, sampling_steps, guidance: how the model is sampled unless asked otherwise; None is, for digits, 50
            steps of DDIM with a little guidance, for a folder DDPM over every timestep without.
        skip_broken: leave out pictures that cannot be read.
    """

    data: str = field(kw_only=False)
    lr: Annotated[float, Meta(gt=0, le=sys.float_info.max)] = 2e-3
    size: Count | None = None
    channels: Annotated[tuple[LevelChannels, ...], Meta(min_length=1)] | None = None
    layers: Layers = 1
    schedule: Literal["linear", "cosine"] = "cosine"
    timesteps: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    init: str | None = None
    sampler: str | None = None
    sampling_steps: Count | None = None
    guidance: Annotated[float, Meta(ge=0, le=sys.float_info.max)] | None = None
    skip_broken: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is not None and (self.channels is not None or self.layers != 1):
            raise ValueError("init brings a network, whose channels and layers are fixed; leave them out")
        halvings = len(self.level_channels) - 1
        if self.init is None and self.image_size % 2**halvings:
            raise ValueError(f"size {self.image_size} must divide by {2**halvings} for {halvings + 1} levels")
        if self.sampler is not None:
            check_choice("sampler", self.sampler, tuple(SAMPLERS))
        self.make_plan()

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

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule of T timesteps that is trained with."""
        return SCHEDULES[self.schedule](self.timesteps)

    def sampling(self) -> dict[str, Any]:
        """How the model is sampled unless asked otherwise."""
        kept = dict(DIGITS_SAMPLING if self.data == "digits" else FOLDER_SAMPLING)
        if self.sampler not in (None, kept["sampler"]):
            kept.pop("eta", None)
        asked = {"sampler": self.sampler, "steps": self.sampling_steps, "guidance_scale": self.guidance}
        kept |= {name: value for name, value in asked.items() if value is not None}
        if kept.get("steps", 0) > self.timesteps and self.sampling_steps is None:
            kept["steps"] = self.timesteps
        return kept

    def make_plan(self) -> Plan:
        """The plan of `sampling`; ValueError for what cannot be sampled so, before a training ends with it."""
        kept = self.sampling()
        kept.pop("guidance_scale", None)
        return resolve_plan(schedule=self.noise_schedule(), prediction=self.prediction, **kept)


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


def scheduler_config(schedule: NoiseSchedule, prediction: str = "epsilon") -> dict[str, Any]:
    """scheduler_config.json: what diffusers' DDPMScheduler, and `NoiseSchedule.from_diffusers`, read."""
    known = (name for name, make in SCHEDULES.items() if make(len(schedule)) == schedule)
    name = next(known, None)
    betas: dict[str, Any] = {"beta_schedule": _DIFFUSERS_NAMES[name]} if name is not None else {}
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(schedule),
        **(betas or {"beta_schedule": "linear", "trained_betas": schedule.betas.tolist()}),
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": prediction,
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",
        "clip_sample": True,
        "clip_sample_range": 1.0,
    }


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `Settings.dtype` means on a device."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.float32  # bfloat16 took 1.6 times as long, at 0.7 and at 18 million parameters, with AVX512-BF16
