"""What is asked of ``generate``: the arguments, checked; and the job, model and folder that they stand for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdiff.checks import check_choice, check_dtype, check_int, named_device, nearest
from fastdiff.generation.batch import best_batch_size
from fastdiff.generation.job import MOST, SUFFIXES, Folder, Job, describe
from fastdiff.generation.labels import Labels
from fastdiff.generation.models import ClassModel, Model, Source, model_of
from fastdiff.generation.prompts import Prompts
from fastdiff.generation.shares import local_rank
from fastdiff.generation.stores import Disk
from fastdiff.pictures.recipe import IN_THE_PLAN
from fastdiff.training.signals import Signals

SAMPLING = (*IN_THE_PLAN, "guidance_rescale", "guidance_interval", "thresholding", "model_dtype")
OF_WORDS = ("negative_prompt", "size")


@dataclass(frozen=True)
class Request:
    """The arguments of ``generate`` that say which images; its docstring has their meanings. ValueError, TypeError."""

    model: Source
    num: int | None
    out: str | os.PathLike[str]
    labels: str | os.PathLike[str] | None
    prompts: str | os.PathLike[str] | Sequence[str] | None
    guidance_scale: float | None
    seed: int
    shard_size: int
    batch_size: int | None
    format: str
    recipes: bool
    device: str
    dtype: torch.dtype
    accelerate: bool | None
    batch_invariant: bool
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num is not None:
            check_int("num", self.num, 1, MOST)
        elif self.prompts is None:
            raise ValueError("num must be given: without prompts nothing says how many images")
        check_int("shard_size", self.shard_size, 1, MOST)
        check_choice("format", self.format, tuple(SUFFIXES))
        check_dtype("dtype", self.dtype)
        size = self.batch_size
        if size is not None and self.shard_size % check_int("batch_size", size, 1, self.shard_size):
            raise ValueError(f"batch_size must divide shard_size, {self.shard_size}; got {size}")
        if not isinstance(self.batch_invariant, bool):
            raise TypeError(f"batch_invariant must be a bool; got {type(self.batch_invariant).__name__}")
        if self.batch_invariant and self.accelerate is False:
            raise ValueError("batch_invariant=True is a promise of accelerate; accelerate is False")
        known = SAMPLING if self.prompts is None else (*SAMPLING, *OF_WORDS)
        for name in self.sampling:
            if name in OF_WORDS and self.prompts is None:
                raise ValueError(f"{name} goes with prompts")
            if name not in known:
                raise TypeError(f"{name} is no argument of generate" + nearest(name, known))
        if self.prompts is not None and self.labels is not None:
            raise ValueError("labels and prompts exclude each other: a model draws from classes or from words")


@dataclass(frozen=True)
class Prepared:
    """What a worker needs: the place, the job, the model on its device, and the label or prompt of each image."""

    folder: Folder
    job: Job
    model: Model
    given: Labels | Prompts


@contextmanager
def prepared(asked: Request, signals: Signals, *, look_for_batch: bool = True) -> Iterator[Prepared]:
    """The job that is asked for, not yet claimed, with its model in place; raises what is wrong before any work.

    look_for_batch: find the fastest batch size where nothing says one; otherwise the job's is 1.
    """
    folder = Folder(asked.out)
    if asked.format == "png" and not isinstance(folder.store, Disk):
        raise ValueError(f"format png makes folders of files, and {folder.path} has objects: take tar or npz")
    then = folder.read()
    prompts = None if asked.prompts is None else Prompts(asked.prompts, asked.num)
    model = model_of(asked.model, words=prompts is not None, dtype=asked.dtype)
    given: Labels | Prompts
    if prompts is not None:
        given, num = prompts, len(prompts)
    else:
        assert asked.num is not None
        assert isinstance(model, ClassModel)
        given, num = Labels(model.trained.classes, asked.labels, asked.num), asked.num
    model.to(device_of_process(asked.device), asked.dtype)
    signals.at_once = True  # until the first batch
    with model.accelerated(asked.dtype, asked.accelerate, asked.batch_invariant):
        of_image: Any = given.of(range(1))  # a label, or a prompt, as the model takes them
        recipe = model.first(of_image, asked.seed, asked.guidance_scale, asked.sampling)
        size = asked.batch_size or (1 if then is None else then.batch_size)
        told = {"labels": "none", "prompts": prompts.told} if prompts is not None else {"labels": given.told}
        job = Job(
            num=num, shard_size=asked.shard_size, batch_size=size, format=asked.format,  # type: ignore[arg-type]
            recipes=asked.recipes, recipe=describe(recipe), **told,
        )  # fmt: skip
        if then is not None:
            job.check_same(then, folder.path)
        elif asked.batch_size is None and look_for_batch:
            job = job.of_batches(best_batch_size(job, model, given))
        yield Prepared(folder, job, model, given)


def device_of_process(name: str) -> torch.device:
    """ "auto" and "cuda" are the GPU of the process's number on this machine."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{local_rank() % torch.cuda.device_count()}"
    return named_device(name)
