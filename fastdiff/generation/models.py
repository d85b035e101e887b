"""What draws a job's images: a model of classes, or of none, or a pipeline of words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from fastdiff.acceleration.worthwhile import accelerated, worthwhile
from fastdiff.models.trained import TrainedModel, digits, load
from fastdiff.pictures.recipe import Recipe, device_of
from fastdiff.pictures.values import to_plain
from fastdiff.sampling.accelerated import is_batch_invariant
from fastdiff.text.load import PACKAGED
from fastdiff.text.load import load as load_words
from fastdiff.text.pipeline import Pipeline
from fastdiff.text.prompts import warn_of_losses

Source = TrainedModel | Pipeline | str | os.PathLike[str] | None


@dataclass
class ClassModel:
    """A ``TrainedModel``. What its images are given each is a label, int; None without classes."""

    trained: TrainedModel

    @property
    def network(self) -> nn.Module:
        """What a recipe's ``sample`` takes."""
        return self.trained.unet

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.trained.unet.to(device=device, dtype=dtype)

    def accelerated(
        self, dtype: torch.dtype, force: bool | None, batch_invariant: bool
    ) -> AbstractContextManager[None]:
        force = True if batch_invariant else force
        return accelerated(self.trained.unet, dtype, force=force, batch_invariant=batch_invariant)

    def first(
        self, given: Sequence[int] | None, seed: int, guidance_scale: float | None, sampling: Mapping[str, Any]
    ) -> Recipe:
        """The recipe of image 0, which checks the arguments."""
        if self.trained.image_shape[0] not in (1, 3):
            raise ValueError(
                f"the model's images have {self.trained.image_shape[0]} channels, and pictures have 1 or 3"
            )
        if guidance_scale not in (None, 1.0) and not self.trained.classes:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a class-conditional model; this one has no classes"
            )
        labels = None if given is None else torch.tensor(given, device=device_of(self.trained.unet))
        more = {name: value for name, value in sampling.items() if name != "sampler_options"}
        told = self.trained.arguments(labels, guidance_scale, **more)
        if options := sampling.get("sampler_options"):  # beside the folder's
            told["sampler_options"] = told.get("sampler_options", {}) | options
        return Recipe.of(self.trained.unet, (1, *self.trained.image_shape), seed=seed, **told)

    def told(self, first: Recipe, given: Sequence[int] | None) -> Recipe:
        """The recipe of image 0 with the labels of a batch in the place of its own."""
        if given is None:
            return first
        scale = first.arguments.get("guidance_scale", 1.0)
        told = self.trained.arguments(torch.tensor(given, dtype=torch.int64), scale)
        kept = {name: to_plain(name, told[name]) for name in ("model_kwargs", "uncond_kwargs") if name in told}
        return msgspec.structs.replace(first, arguments={**first.arguments, **kept})

    def record(self, given: int) -> dict[str, Any]:
        """What a shard says of an image."""
        return {"label": given, "class": self.trained.classes[given]}


@dataclass
class WordModel:
    """A ``Pipeline``. What its images are given each is a prompt."""

    pipe: Pipeline

    @property
    def network(self) -> Pipeline:
        return self.pipe

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Of a pipeline that was given only the device is changed: its autoencoder's dtype may be another."""
        if dtype not in (torch.float32, self.pipe.unet.dtype):
            raise ValueError(
                f"dtype is {dtype}, and the pipeline's {self.pipe.unet.dtype}: fastdiff.load takes a dtype"
            )
        self.pipe.pipe.to(device)

    @contextmanager
    def accelerated(self, dtype: torch.dtype, force: bool | None, batch_invariant: bool) -> Iterator[None]:
        there = self.pipe.report is not None
        if there and batch_invariant and not is_batch_invariant(self.pipe.unet):
            raise ValueError(
                "batch_invariant=True needs a pipeline that is accelerated so: fastdiff.load(…, batch_invariant=True)"
            )
        put = not there and (batch_invariant or (worthwhile(self.pipe.unet) if force is None else force))
        if put:
            self.pipe.accelerate(batch_invariant=batch_invariant)
        try:
            yield
        finally:
            if put:
                self.pipe.restore()

    def first(
        self, given: Sequence[str] | None, seed: int, guidance_scale: float | None, sampling: Mapping[str, Any]
    ) -> Recipe:
        return self.pipe.recipe(list(given or ()), seed=seed, guidance_scale=guidance_scale, **sampling)

    def told(self, first: Recipe, given: Sequence[str]) -> Recipe:
        assert first.words is not None
        warn_of_losses(self.pipe.pipe, given)
        return msgspec.structs.replace(first, words=msgspec.structs.replace(first.words, prompts=list(given)))

    def record(self, given: str) -> dict[str, Any]:
        return {"prompt": given}


Model = ClassModel | WordModel


def model_of(source: Source, *, words: bool, dtype: torch.dtype) -> Model:
    """The model that a source names, or is; on the CPU where it is loaded. words: whether there are prompts."""
    if not words and (isinstance(source, Pipeline) or (isinstance(source, str) and source in PACKAGED)):
        raise ValueError("prompts must be given: this model draws from words")
    if isinstance(source, Pipeline):
        return WordModel(source)
    if isinstance(source, TrainedModel):
        if words:
            raise ValueError("prompts need a model that draws from words, of fastdiff.load; this one draws classes")
        return ClassModel(source)
    if source is not None and not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"model must be a folder or what fastdiff.models.load returns; got {type(source).__name__}")
    if not words:
        return ClassModel(digits() if source is None else load(source))
    name = "emoji" if source is None else source
    if Path(name).is_dir() and not (Path(name) / "model_index.json").exists():
        raise ValueError(f"prompts need a pipeline of words; {name} has no model_index.json")
    pipe = load_words(name, device="cpu", dtype=dtype, accelerate=False)
    if not isinstance(pipe, Pipeline):
        raise ValueError(f"prompts need a pipeline of words; {name} is a {type(pipe).__name__}")
    return WordModel(pipe)
