"""What a folder holds: the manifest, derived from the shards; every hash checked; some batches made again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.checks import check_int
from fastdiff.generation.batch import make
from fastdiff.generation.formats import read_shard, sha256, shard_sha256
from fastdiff.generation.job import JOB, MANIFEST, UNFINISHED, Folder, Job
from fastdiff.generation.manifest import derive, in_place, line, listed
from fastdiff.generation.models import ClassModel, Model, WordModel
from fastdiff.models.trained import PACKAGED, digits, load
from fastdiff.ops.native import cpu_threads
from fastdiff.pictures.grid import to_uint8
from fastdiff.pictures.network import identify
from fastdiff.pictures.reproduce import load_network, load_pipeline, threads_of


@dataclass(frozen=True)
class Verified:
    """What ``fastdiff.generation.verify.verify`` found; prints as the verdict.

    Attributes:
        path: the folder, or its URL.
        num: images that the job has.
        missing: names of shards that are not there.
        damaged: of each shard that is not what was made, why.
        unlike: of each batch that was made again and came out otherwise, how.
        again: how many batches were made again.
        sha256: of the whole set, each image's number and SHA-256 in order; None where something is missing or damaged.
    """

    path: Path | str
    num: int
    missing: tuple[str, ...]
    damaged: dict[str, str]
    unlike: tuple[str, ...]
    again: int
    sha256: str | None

    @property
    def right(self) -> bool:
        """Whether all is there and as it was made."""
        return not (self.missing or self.damaged or self.unlike)

    def __str__(self) -> str:
        lines = [f"{self.path}/{name}: damaged: {why}" for name, why in self.damaged.items()] + list(self.unlike)
        if self.missing:
            lines.append(f"{self.path}: {len(self.missing)} shards are missing: {', '.join(self.missing[:5])}"
                         f"{' …' * (len(self.missing) > 5)}")  # fmt: skip
        if self.sha256 is not None:
            lines.append(f"{self.path}: {self.num:,} images, every hash right, sha256 {self.sha256}")
        if self.again:
            lines.append(
                f"{self.path}: {self.again - len(self.unlike)} of {self.again} batches made again are the same"
            )
        return "\n".join(lines)


def verify(
    folder: str | os.PathLike[str],
    *,
    remake: int = 0,
    discard: bool = False,
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> Verified:
    """Check every image of a job's folder against its hash and number, and every shard against the manifest.

    remake: so many batches, evenly spread, are made again and compared. model: where it is, if not as then.
    device: where; None is where the job was begun, if that is here, and else the CPU.
    discard: remove damaged shards, so that ``generate`` makes them again.
    Raises OSError or ValueError for what is no job's folder, and where the network is another one.
    """
    place = Folder(folder)
    check_int("remake", remake, 0, 1 << 32)
    job = place.read()
    if job is None:
        raise FileNotFoundError(f"{place.path} is no folder of fastdiff generate: it has no {JOB}")
    again = _model(job, model, device) if remake else None  # before the work
    named, published = listed(place), place.published(job)
    damaged: dict[str, str] = {}
    digest = hashlib.sha256()
    for shard in sorted(published):
        name = job.shard_name(shard)
        try:
            with place.store.local(name) as shard_file:
                told = named.get(name)
                if told is not None and told != shard_sha256(job.format, shard_file):
                    raise ValueError(f"it is not what {MANIFEST} names")
                for record in in_place(job, shard, _right(job, shard_file)):
                    digest.update(line(record))
        except Exception as error:  # damaged bytes raise nearly anything
            damaged[name] = f"{type(error).__name__}: {error}"
            if discard:
                place.store.remove(name)
                place.store.remove(MANIFEST)  # it tells of a whole set
    missing = tuple(job.shard_name(shard) for shard in range(job.shards) if shard not in published)
    whole = not missing and not damaged
    if whole and not named:
        place.store.remove(UNFINISHED)  # of a run that was killed when all was published
        derive(place, job)
    unlike: tuple[str, ...] = ()
    chosen = _spread([shard for shard in sorted(published) if job.shard_name(shard) not in damaged], job, remake)
    if again is not None:
        unlike = tuple(found for shard, batch in chosen if (found := _again(place, job, again, shard, batch)))
    return Verified(place.path, job.num, missing, damaged, unlike, len(chosen), digest.hexdigest() if whole else None)


def _right(job: Job, path: Path) -> Iterator[dict[str, Any]]:
    """The records of a shard whose images are what they say."""
    for record, pixels in read_shard(job.format, path):
        if sha256(pixels) != record["sha256"]:
            raise ValueError(f"image {record['number']} is not the one that its record names")
        yield record


def _model(job: Job, model: Any, device: str | None) -> Model:
    identity = job.images.network
    source = identity.folder if model is None else model
    if source is None:
        raise ValueError(f"{JOB} does not say where the model came from: name its folder")
    if device is None and torch.cuda.is_available() and job.images.made_with.get("device", "cpu") != "cpu":
        device = "cuda"
    found: Model
    if job.images.words is not None:
        found = WordModel(load_pipeline(identity, source, device))
    else:
        trained = digits() if os.fspath(source) == PACKAGED else load(source)
        trained.unet = load_network(identity, source, device)
        found = ClassModel(trained)
    if (now := str(identify(found.network).sha256)) != identity.sha256:
        raise ValueError(f"the images are of network {str(identity.sha256)[:16]}; the one in {source} is {now[:16]}")
    return found


def _spread(shards: list[int], job: Job, most: int) -> list[tuple[int, range]]:
    """At most so many (shard, batch), evenly spread over what is there."""
    batches = -(-job.shard_size // job.batch_size)
    total = sum(len(job.batches(shard)) for shard in shards)
    count = min(most, total)
    wanted = {i * total // count for i in range(count)} if count else set()
    chosen = []
    for i in sorted(wanted):
        shard = shards[i // batches]
        chosen.append((shard, job.batches(shard)[i % batches]))
    return chosen


def _again(place: Folder, job: Job, model: Model, shard: int, batch: range) -> str | None:
    """How a batch that is made again differs."""
    kept = [(record, pixels) for record, pixels in place.images(job, shard) if record["number"] in batch]
    name = next((name for name in ("label", "prompt") if name in kept[0][0]), None)
    given = None if name is None else [record[name] for record, _ in kept]
    with cpu_threads(threads_of(kept[0][0]["made_with"])):  # on which rounding may depend
        now = to_uint8(make(job, model, batch, given).images).permute(0, 2, 3, 1).numpy()
    apart = [
        (number, abs(then.astype(int) - pixels)) for number, (_, then), pixels in zip(batch, kept, now, strict=True)
    ]
    wrong = [(number, off) for number, off in apart if off.any()]
    if not wrong:
        return None
    which, most = f"images {batch.start} to {batch.stop - 1}", max(int(off.max()) for _, off in wrong)
    return f"{place.path}: {len(wrong)} of {which} come out otherwise when made again, by at most {most} of 255"
