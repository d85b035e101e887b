"""``fastdiff.generate``: thousands of images, each made once, whatever ends a run in between."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdiff.generation.batch import entries, make
from fastdiff.generation.formats import size_of
from fastdiff.generation.job import UNFINISHED, Folder, Job
from fastdiff.generation.manifest import manifest
from fastdiff.generation.models import Source
from fastdiff.generation.processes import check_launch, in_processes
from fastdiff.generation.ray_engine import on_ray
from fastdiff.generation.request import Prepared, Request, prepared
from fastdiff.generation.run import run
from fastdiff.generation.shares import launcher, share_of
from fastdiff.training.signals import Signals

SHARD = 1024


@dataclass(frozen=True)
class Generated:
    """What a folder holds after a run; prints as one would say it.

    Attributes:
        path: the folder, or its URL.
        num: images that the job has; made: of them in published shards.
        failed: of each shard that this run could not make, by its name, why.
        sha256: of the whole set; None where something is missing.
        seconds, bytes: of a dry run, what making the rest would take one process, and all of it the disk.
    """

    path: Path | str
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
    model: Source,
    num: int | None,
    out: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    shard_size: int = SHARD,
    batch_size: int | None = None,
    format: str = "tar",
    recipes: bool = True,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    accelerate: bool | None = None,
    batch_invariant: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    workers: int | None = None,
    gpus: int | str | None = None,
    engine: str | None = None,
    dry_run: bool = False,
    progress: bool = False,
    **sampling: Any,
) -> Generated:
    """Make images 0 … num - 1 of a seed, in shards, into a folder; what is there already is not made again.

        fastdiff.generate("my-digits", 50_000, "set", seed=1, steps=20)
        fastdiff.generate("emoji", None, "s3://bucket/pictures", prompts="prompts.txt")

    Image i is what ``fastdiff.sample``, or a pipeline of prompt i, draws as number i. Any number of processes may make
    one set, at once or one after another: they need nothing but the folder. The same call again makes what is missing.

    Args:
        model: a folder that ``fastdiff train`` or diffusers wrote, or what ``fastdiff.models.load`` returns, whose
            network is moved to the device and dtype; None: the digits in the package. With prompts what
            ``fastdiff.load`` takes or returns; None: "emoji".
        num: images of the whole set; with prompts None is as many as there are.
        out: the folder, which is made, or one of the same job; or an s3://, gs://, az://, memory:// or file:// URL (the
            extra "stores"), whose credentials stand in the environment, as the clouds' own tools have them.
        labels: "balanced", or a file with a class a line, by name or number; None: balanced, where there are classes.
        prompts: a file with a prompt a line, at least num of them, or a list; prompt i is image i's.
        guidance_scale: in place of the folder's; 1 is none.
        shard_size: images a shard.
        batch_size: images that the network is given at a time; it divides shard_size. None takes the job's, or the
            fastest, which is looked for once and kept in job.json, since a network's rounding depends on it.
        format: "tar" (WebDataset), "png" (folders of PNGs, on file systems) or "npz".
        recipes: keep in each PNG how it was made, for ``fastdiff.reproduce``.
        device: "auto" is the GPU of the process's number on its machine, where there is one.
        dtype: what the network computes in. accelerate: its fast path; None: for networks of a million weights or more.
        batch_invariant: compute each image so that its bits do not depend on its batch (``fastdiff.accelerate``, which
            it turns on): runs of one set may then have batches of different sizes, and the shards' bytes are the same.
        rank, world_size: this process and how many there are, where the environment does not say (``share_of``).
        workers: make the set in so many processes of this machine, which share its cores; of a script they start from
            the file's top, so call this under ``if __name__ == "__main__":``. With engine "ray": so many actors.
        gpus: in a process, or an actor, for each of so many GPUs; "all": for every one.
        engine: None, processes of this machine; "ray", actors of a Ray cluster (the extra "ray").
        dry_run: make no file, but one batch, and say what is missing and what it would take.
        progress: show a bar in process 0, of all processes' images.
        sampling: sampler, steps, eta and so on of ``fastdiff.sample`` (not what gives single images a start of their
            own), in place of the model's own; with prompts also negative_prompt, one for all, and size.

    Raises:
        ValueError, TypeError, OSError, ImportError: for wrong arguments, a folder of another job, a store that cannot
            be used and an extra that is missing, before any work.
        Interrupted: after SIGINT or SIGTERM, when the batch that was being made is on the disk.
    """
    asked = Request(
        model, num, out, labels, prompts, guidance_scale, seed, shard_size, batch_size, format, recipes, device, dtype,
        accelerate, batch_invariant, sampling,
    )  # fmt: skip
    share = share_of(rank, world_size)
    shared = rank is not None or world_size is not None
    check_launch(workers, gpus, engine, asked, dry_run=dry_run, shared=shared)
    if engine == "ray":
        folder, job, failed = on_ray(asked, workers, gpus, progress)
    elif workers is not None or gpus is not None:
        folder, job, failed = in_processes(asked, share, workers, gpus, progress)
    else:
        with Signals() as signals, prepared(asked, signals) as ready:
            if dry_run:
                return _estimate(ready)
            folder, job, failed = run(ready, asked, share, signals, launcher(), progress and share.rank == 0)
    return _finished(folder, job, failed)


def _finished(folder: Folder, job: Job, failed: dict[int, str]) -> Generated:
    """The manifest of a set that is whole, and what there is now."""
    published = folder.published(job)
    failed = {shard: why for shard, why in failed.items() if shard not in published}  # another process made it
    sha256 = None
    if len(published) == job.shards:
        folder.store.remove(UNFINISHED)
        sha256 = manifest(folder, job)
    elif not failed:
        raise RuntimeError(f"{folder.path}: shards are missing that this run made: were they removed?")
    return Generated(
        folder.path,
        job.num,
        job.count(published),
        {job.shard_name(k): why for k, why in sorted(failed.items())},
        sha256,
    )


def _estimate(ready: Prepared) -> Generated:
    """What there is, and what the rest would take, by one batch that is made and left."""
    folder, job, model = ready.folder, ready.job, ready.model
    made = job.count(folder.published(job))
    batch = job.batches(0)[0]
    began = time.perf_counter()
    found = entries(job, model, make(job, model, batch, ready.given.of(batch)))
    seconds = (time.perf_counter() - began) / len(batch) * (job.num - made)
    return Generated(
        folder.path, job.num, made, seconds=seconds, bytes=job.num * size_of(job.format, found) // len(batch)
    )
