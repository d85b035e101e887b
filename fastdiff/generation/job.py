"""A job: which images, cut into which shards and batches; and the folder that holds them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fastdiff.files import atomic_write, parse_json
from fastdiff.generation.formats import Pixels, read_shard
from fastdiff.generation.stores import store_of
from fastdiff.pictures.recipe import Recipe, from_object

FORMAT, VERSION = "fastdiff.job", 1
JOB, MANIFEST, UNFINISHED = "job.json", "manifest.jsonl", ".unfinished"
SUFFIXES = {"tar": ".tar", "png": "", "npz": ".npz"}  # a shard of PNGs is a folder
MOST = 1 << 32  # sample numbers of one seed
_BATCH = re.compile(r"(\d+)-(\d+)\.tar")

Positive = Annotated[int, Meta(ge=1, le=MOST)]


class Job(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What job.json holds: all that the images' bits depend on, but for the machine.

    Networks round differently for batches of different sizes. The grid of shards and batches therefore stands here, and
    never moves, whoever makes which batch; but where the network is ``batch_invariant``, each run may have its own
    batches.

    Attributes:
        num: images, of the numbers 0 … num - 1.
        shard_size: images a shard; batch_size: images a batch, which divides it. The last ones may be shorter.
        format: of the shards.
        labels: where the labels come from, in words, with their SHA-256; prompts: likewise, of a job of words.
        recipes: whether each PNG carries its recipe.
        recipe: of image 0, without its label, as ``Recipe.to_json`` has it.
    """

    num: Positive
    shard_size: Positive
    batch_size: Positive
    format: Literal["tar", "png", "npz"]
    labels: str
    recipes: bool
    recipe: dict[str, Any]
    prompts: str | None = None

    @property
    def batch_invariant(self) -> bool:
        """Whether an image's bits do not depend on the batch that it is made in."""
        return bool((self.recipe["network"].get("accelerated") or {}).get("batch_invariant"))

    @property
    def shards(self) -> int:
        return -(-self.num // self.shard_size)

    @property
    def images(self) -> Recipe:
        """The recipe of image 0, without its label."""
        return from_object(self.recipe)

    def of_batches(self, size: int) -> Job:
        """The job on the grid of another batch size."""
        return msgspec.structs.replace(self, batch_size=size)

    def numbers(self, shard: int) -> range:
        """The numbers of a shard's images."""
        return range(shard * self.shard_size, min(self.num, (shard + 1) * self.shard_size))

    def batches(self, shard: int) -> list[range]:
        """The numbers of the images of each of a shard's batches."""
        numbers = self.numbers(shard)
        return [numbers[i : i + self.batch_size] for i in range(0, len(numbers), self.batch_size)]

    def count(self, shards: Iterable[int]) -> int:
        """The images of some shards."""
        return sum(len(self.numbers(shard)) for shard in shards)

    def shard_name(self, shard: int) -> str:
        return f"shard-{shard:06d}{SUFFIXES[self.format]}"

    def image_name(self, number: int) -> str:
        return f"{number:0{max(6, len(str(self.num - 1)))}d}"

    def told(self) -> dict[str, Any]:
        """What must be the same in every run of the job, in words."""
        of_recipe, network = self.recipe, self.recipe["network"]
        told = {
            name: getattr(self, name)
            for name in ("num", "shard_size", "batch_size", "format", "labels", "recipes", "prompts")
        }
        if self.batch_invariant:
            del told["batch_size"]
        told["image shape"] = of_recipe["shape"][1:]
        told |= of_recipe["arguments"]
        told["negative_prompt"] = (of_recipe.get("words") or {}).get("negative_prompts")
        told["plan"] = f"{of_recipe['plan'].get('name')} {self.plan_sha256[:16]}"
        told["network"] = f"{network['name']} {str(network.get('sha256'))[:16]}"
        return told | {name: network.get(name) for name in ("dtype", "accelerated", "channels_last", "compiled")}

    @property
    def plan_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.recipe["plan"], sort_keys=True).encode()).hexdigest()

    def check_same(self, then: Job, folder: Path | str) -> None:
        """ValueError where the folder's job was another one, with both values of what differs."""
        now, before = self.told(), then.told()
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            found = ", ".join(f"{name} {before.get(name)} (now {now.get(name)})" for name in names)
            raise ValueError(f"{folder} is the folder of another job: {found}")


def describe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a job keeps it: without what differs from batch to batch."""
    content: dict[str, Any] = json.loads(recipe.to_json())
    for name in ("model_kwargs", "uncond_kwargs", "sample_offset"):
        content["arguments"].pop(name, None)
    return content


class Folder:
    """The place of a job: a folder, or a URL's objects. What is published is done; there is no other state.

    The batches of a shard that is being made are small tars in ``.unfinished/shard-000003``, named by their first
    image's number and the one after their last's. The first worker that finds all images there makes the shard of them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.store = store_of(path)
        self.path = self.store.place

    def read(self) -> Job | None:
        """The job whose folder it is; None for a folder that is missing or empty; ValueError for any other."""
        text = self.store.read(JOB)
        if text is None:
            names = self.store.names()
            if JOB in names:  # another worker's, since
                return self.read()
            if set(names) - {UNFINISHED}:
                raise FileExistsError(f"{self.path} holds other files and no {JOB}: name a folder of its own")
            return None
        place = f"{self.path}/{JOB}"
        try:
            content = parse_json(text, infinities=True)
            if not isinstance(content, dict):
                raise ValueError(f"it must hold a JSON object; got a {type(content).__name__}")
            if content.pop("what", None) != FORMAT or content.pop("version", None) != VERSION:
                raise ValueError(f"it must have what={FORMAT!r} and version {VERSION}")
            job = msgspec.convert(content, Job)
            from_object(job.recipe)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{place} cannot be read: {error}") from None
        return job

    def claim(self, job: Job, *, adopt: bool = False) -> Job:
        """Make the folder this job's, and return the job as job.json has it; ValueError where that is another job.

        adopt: where another process was first, take its batch size. A batch-invariant job keeps its own otherwise.
        """
        then = self.read()
        if then is None:
            self.store.create(JOB, partial(_write_job, job), UNFINISHED)
            then = self.read()
            assert then is not None
        if adopt:
            job = job.of_batches(then.batch_size)
        job.check_same(then, self.path)
        return job if job.batch_invariant else then

    def shard(self, job: Job, shard: int) -> Path:
        """The path of a shard, of a job in a folder."""
        return Path(self.path) / job.shard_name(shard)

    def images(self, job: Job, shard: int) -> Iterator[tuple[dict[str, Any], Pixels]]:
        """The records and pixels of a published shard, as ``read_shard`` has them."""
        with self.store.local(job.shard_name(shard)) as path:
            yield from read_shard(job.format, path)

    def beside(self, shard: int) -> str:
        """The name of the folder of a shard's batches."""
        return f"{UNFINISHED}/shard-{shard:06d}"

    def batch(self, shard: int, batch: range) -> str:
        return f"{self.beside(shard)}/{batch.start}-{batch.stop}.tar"

    def kept(self, shard: int) -> list[range]:
        """The batches of a shard that are there, of whatever sizes, in order."""
        names = self.store.names(self.beside(shard))
        found = [range(int(match[1]), int(match[2])) for name in names if (match := _BATCH.fullmatch(name))]
        return sorted(found, key=lambda batch: (batch.start, batch.stop))

    def published(self, job: Job) -> set[int]:
        """The shards that are there, by one listing."""
        name = re.compile(rf"shard-(\d{{6,}}){re.escape(SUFFIXES[job.format])}")
        found = {int(match[1]) for entry in self.store.names() if (match := name.fullmatch(entry))}
        return found & set(range(job.shards))


def _write_job(job: Job, path: Path) -> None:
    content = {"what": FORMAT, "version": VERSION, **msgspec.to_builtins(job)}
    lines = [f'"{name}": {json.dumps(value)}' for name, value in content.items()]
    with atomic_write(path) as file:
        file.write(("{" + ",\n ".join(lines) + "}\n").encode())
