"""``fastdiff.generate``: thousands of images, each made once, whatever ends a run in between."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from fastdiff.acceleration.worthwhile import accelerated
from fastdiff.checks import check_choice, check_dtype, check_int, named_device, nearest
from fastdiff.files import remove
from fastdiff.generation.batch import best_batch_size, entries, make
from fastdiff.generation.formats import size_of
from fastdiff.generation.job import MOST, SUFFIXES, Folder, Job, describe
from fastdiff.generation.labels import Labels
from fastdiff.generation.manifest import manifest
from fastdiff.generation.progress import Bar
from fastdiff.generation.shares import launcher, local_rank, share_of
from fastdiff.generation.worker import Worker
from fastdiff.models.trained import TrainedModel, digits, load
from fastdiff.pictures.network import environment
from fastdiff.pictures.recipe import IN_THE_PLAN, Recipe, device_of
from fastdiff.training.signals import Interrupted, Signals

SHARD = 1024
SAMPLING = (*IN_THE_PLAN, "guidance_rescale", "guidance_interval", "thresholding", "model_dtype")


@dataclass(frozen=True)
class Generated:
    """What a folder holds after a run; prints as one would say it.

    Attributes:
        path: the folder.
        num: images that the job has; made: of them in published shards.
        failed: of each shard that this run could not make, by its name, why.
        sha256: of the whole set; None where something is missing.
        seconds, bytes: of a dry run, what making the rest would take one process, and all of it the disk.
    """

    path: Path
    num: int
    made: int
    failed: dict[str, str] = field(default_factory=dict)
    sha256: str | None = None
    seconds: float | None = None
    bytes: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.path}/{name}: not made: {why}" for name, why in self.failed.items()]
        if self.sha256 is not None:
            lines.append(f"{self.path}: {self.num:,} images, sha256 {self.sha256}")
        else:
            lines.append(f"{self.path}: {self.made:,} of {self.num:,} images are made")
        if self.seconds is not None and self.bytes is not None:
            lines.append(f"the rest would take one process {self.seconds:,.0f} s; all, {self.bytes / 1e6:,.1f} MB")
        return "\n".join(lines)


def generate(
    model: TrainedModel | str | os.PathLike[str] | None,
    num: int,
    out: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    prompts: str | os.PathLike[str] | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    shard_size: int = SHARD,
    batch_size: int | None = None,
    format: str = "tar",
    recipes: bool = True,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    accelerate: bool | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    dry_run: bool = False,
    progress: bool = False,
    **sampling: Any,
) -> Generated:
    """Make images 0 … num - 1 of a seed, in shards, into a folder; what is there already is not made again.

        fastdiff.generate("my-digits", 50_000, "set", seed=1, steps=20)

    Image i is what ``fastdiff.sample`` draws as number i. Any number of processes may make one set, at once or one
    after another: they need nothing but the folder. The same call again makes what is missing.

    Args:
        model: a folder that ``fastdiff train`` or diffusers wrote, or what ``fastdiff.models.load`` returns, whose
            network is moved to the device and dtype; None: the digits in the package.
        num: images of the whole set.
        out: the folder, which is made; or one of the same job.
        labels: "balanced", or a file with a class a line, by name or number; None: balanced, where there are classes.
        prompts: not served yet.
        guidance_scale: in place of the folder's; 1 is none.
        shard_size: images a shard.
        batch_size: images that the network is given at a time; it divides shard_size. None takes the job's, or the
            fastest, which is looked for once and kept in job.json, since a network's rounding depends on it.
        format: "tar" (WebDataset), "png" (folders of PNGs) or "npz".
        recipes: keep in each PNG how it was made, for ``fastdiff.reproduce``.
        device: "auto" is the GPU of the process's number on its machine, where there is one.
        dtype: what the network computes in. accelerate: its fast path; None: for networks of a million weights or more.
        rank, world_size: this process and how many there are, where the environment does not say (``share_of``).
        dry_run: make no file, but one batch, and say what is missing and what it would take.
        progress: show a bar in process 0, of all processes' images.
        sampling: sampler, steps, eta and so on of ``fastdiff.sample`` (not what gives single images a start of their
            own), in place of the model's own.

    Raises:
        ValueError, TypeError, OSError: for wrong arguments, and a folder of another job, before any work.
        Interrupted: after SIGINT or SIGTERM, when the batch that was being made is on the disk.
    """
    check_int("num", num, 1, MOST)
    check_int("shard_size", shard_size, 1, MOST)
    check_choice("format", format, tuple(SUFFIXES))
    check_dtype("dtype", dtype)
    if batch_size is not None and shard_size % check_int("batch_size", batch_size, 1, shard_size):
        raise ValueError(f"batch_size must divide shard_size, {shard_size}; got {batch_size}")
    for name in sampling:
        if name not in SAMPLING:
            raise TypeError(f"{name} is no argument of generate" + nearest(name, SAMPLING))
    if prompts is not None:
        raise ValueError("prompts: models that draw from words are not served by generate yet; see fastdiff.load")
    share, parent = share_of(rank, world_size), launcher()
    folder = Folder(out)
    then, trained = folder.read(), _trained(model)
    channels = trained.image_shape[0]
    if channels not in (1, 3):
        raise ValueError(f"the model's images have {channels} channels, and pictures have 1 or 3")
    given = Labels(trained, labels, num)
    if guidance_scale not in (None, 1.0) and not trained.classes:
        raise ValueError(f"guidance_scale={guidance_scale} needs a class-conditional model; this one has no classes")
    trained.unet.to(device=_device(device), dtype=dtype)
    with accelerated(trained.unet, dtype, force=accelerate), Signals() as signals:
        signals.at_once = True  # until the first batch
        recipe = _recipe(trained, given, seed, guidance_scale, sampling)
        size = batch_size or (1 if then is None else then.batch_size)
        job = Job(
            num=num, shard_size=shard_size, batch_size=size, format=format, labels=given.told,  # type: ignore[arg-type]
            recipes=recipes, recipe=describe(recipe),
        )  # fmt: skip
        if then is not None:
            job.check_same(then, folder.path)
        elif batch_size is None:
            job = msgspec.structs.replace(job, batch_size=best_batch_size(job, trained, given))
        if dry_run:
            return _estimate(folder, job, trained, given)
        job = folder.claim(job, adopt=batch_size is None)
        _compare_environment(folder, job, trained)
        if len(folder.published(job)) < job.shards:
            folder.manifest.unlink(missing_ok=True)  # it tells of a whole set
        signals.at_once = False
        with Bar(folder, job, progress and share.rank == 0) as bar:
            worker = Worker(folder, job, trained, given, share, signals, bar.advanced, parent)
            try:
                worker.run()
            except Interrupted as interrupted:
                kept = f"{_made(folder, job):,} of {num:,} images are in shards, and further batches are kept"
                raise Interrupted(f"{interrupted}; {kept}: the same command goes on", interrupted.signal) from None
        return _finished(folder, job, worker.failed)


def _recipe(
    trained: TrainedModel, labels: Labels, seed: int, guidance_scale: float | None, sampling: dict[str, Any]
) -> Recipe:
    """Of image 0, which checks the arguments."""
    first, where = labels.of(range(1)), device_of(trained.unet)
    more = sampling.pop("sampler_options", None) or {}  # beside the folder's
    told = trained.arguments(None if first is None else torch.tensor(first, device=where), guidance_scale, **sampling)
    if more:
        told["sampler_options"] = told.get("sampler_options", {}) | more
    return Recipe.of(trained.unet, (1, *trained.image_shape), seed=seed, **told)


def _finished(folder: Folder, job: Job, failed: dict[int, str]) -> Generated:
    """The manifest of a set that is whole, and what there is now."""
    published = folder.published(job)
    failed = {shard: why for shard, why in failed.items() if shard not in published}  # another process made it
    sha256 = None
    if len(published) == job.shards:
        remove(folder.unfinished)
        sha256 = manifest(folder, job)
    elif not failed:
        raise RuntimeError(f"{folder.path}: shards are missing that this run made: were they removed?")
    return Generated(
        folder.path, job.num, _made(folder, job), {job.shard_name(k): why for k, why in sorted(failed.items())}, sha256
    )


def _made(folder: Folder, job: Job) -> int:
    return sum(len(job.numbers(shard)) for shard in folder.published(job))


def _estimate(folder: Folder, job: Job, trained: TrainedModel, labels: Labels) -> Generated:
    """What there is, and what the rest would take, by one batch that is made and left."""
    made = _made(folder, job) if folder.path.exists() else 0
    batch = job.batches(0)[0]
    began = time.perf_counter()
    found = entries(job, labels.classes, make(job, trained, batch, labels.of(batch)))
    seconds = (time.perf_counter() - began) / len(batch) * (job.num - made)
    return Generated(
        folder.path, job.num, made, seconds=seconds, bytes=job.num * size_of(job.format, found) // len(batch)
    )


def _compare_environment(folder: Folder, job: Job, trained: TrainedModel) -> None:
    then, now = job.images.made_with, environment(device_of(trained.unet))
    differ = [f"{name} {then.get(name)} (now {now[name]})" for name in now if then.get(name) != now[name]]
    if differ:
        told = f"{folder.path} was begun with {', '.join(differ)}: equal bits are not assured"
        warnings.warn(told, stacklevel=3)


def _trained(model: TrainedModel | str | os.PathLike[str] | None) -> TrainedModel:
    if isinstance(model, TrainedModel):
        return model
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a folder or what fastdiff.models.load returns; got {type(model).__name__}")
    return digits() if model is None else load(model)


def _device(name: str) -> torch.device:
    """ "auto" and "cuda" are the GPU of the process's number on this machine."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{local_rank() % torch.cuda.device_count()}"
    return named_device(name)
