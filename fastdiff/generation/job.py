"""A job: which images, cut into which shards and batches; and the folder that holds them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fastdiff.files import atomic_write, publish, read_json_object
from fastdiff.pictures.recipe import Recipe, from_object

FORMAT, VERSION = "fastdiff.job", 1
SUFFIXES = {"tar": ".tar", "png": "", "npz": ".npz"}  # a shard of PNGs is a folder
MOST = 1 << 32  # sample numbers of one seed

Positive = Annotated[int, Meta(ge=1, le=MOST)]


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What job.json holds: all that the images' bits depend on, but for the machine.

    Networks round differently for batches of different sizes. The grid of shards and batches therefore stands here, and
    never moves, whoever makes which batch.

    Attributes:
        num: images, of the numbers 0 … num - 1.
        shard_size: images a shard; batch_size: images a batch, which divides it. The last ones may be shorter.
        format: of the shards.
        labels: where the labels come from, in words, with their SHA-256.
        recipes: whether each PNG carries its recipe.
        recipe: of the first batch, without its labels, as ``Recipe.to_json`` has it.
    """

    num: Positive
    shard_size: Positive
    batch_size: Positive
    format: Literal["tar", "png", "npz"]
    labels: str
    recipes: bool
    recipe: dict[str, Any]

    @property
    def shards(self) -> int:
        return -(-self.num // self.shard_size)

    @property
    def images(self) -> Recipe:
        """The first batch's recipe, without labels."""
        return from_object(self.recipe)

    def numbers(self, shard: int) -> range:
        """The numbers of a shard's images."""
        return range(shard * self.shard_size, min(self.num, (shard + 1) * self.shard_size))

    def batches(self, shard: int) -> list[range]:
        """The numbers of the images of each of a shard's batches."""
        numbers = self.numbers(shard)
        return [numbers[i : i + self.batch_size] for i in range(0, len(numbers), self.batch_size)]

    def shard_name(self, shard: int) -> str:
        return f"shard-{shard:06d}{SUFFIXES[self.format]}"

    def image_name(self, number: int) -> str:
        return f"{number:0{max(6, len(str(self.num - 1)))}d}"

    def told(self) -> dict[str, Any]:
        """What must be the same in every run of the job, in words."""
        of_recipe, network = self.recipe, self.recipe["network"]
        told = {
            name: getattr(self, name) for name in ("num", "shard_size", "batch_size", "format", "labels", "recipes")
        }
        told["image shape"] = of_recipe["shape"][1:]
        told |= of_recipe["arguments"]
        told["plan"] = f"{of_recipe['plan'].get('name')} {self.plan_sha256[:16]}"
        told["network"] = f"{network['name']} {str(network.get('sha256'))[:16]}"
        return told | {name: network.get(name) for name in ("dtype", "accelerated", "channels_last", "compiled")}

    @property
    def plan_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.recipe["plan"], sort_keys=True).encode()).hexdigest()

    def check_same(self, then: Job, folder: Path) -> None:
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
    """The folder of a job. What is published is done; there is no other state.

    The batches of a shard that is being made are small tars in ``.unfinished/shard-000003``. The first worker that
    finds all of them there makes the shard of them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest = self.path / "manifest.jsonl"
        self.unfinished = self.path / ".unfinished"

    def read(self) -> Job | None:
        """The job whose folder it is; None for a folder that is missing or empty; ValueError for any other."""
        place = self.path / "job.json"
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"out must be a folder; {self.path} is a file")
        if not place.exists():
            if self.path.exists() and any(path.name != self.unfinished.name for path in self.path.iterdir()):
                if place.exists():  # another worker's, since
                    return self.read()
                raise FileExistsError(f"{self.path} holds other files and no job.json: name a folder of its own")
            return None
        content = read_json_object(place)
        if content.pop("what", None) != FORMAT or content.pop("version", None) != VERSION:
            raise ValueError(f"{place} must have what={FORMAT!r} and version {VERSION}")
        try:
            job = msgspec.convert(content, Job)
            from_object(job.recipe)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{place} cannot be read: {error}") from None
        return job

    def claim(self, job: Job, *, adopt: bool = False) -> Job:
        """Make the folder this job's, and return what stands in job.json; ValueError where that is another job.

        adopt: where another process was first, take its batch size.
        """
        then = self.read()
        if then is None:
            self.unfinished.mkdir(parents=True, exist_ok=True)
            temporary = self.temporary(self.unfinished, "job.json")
            with atomic_write(temporary) as file:
                content = {"what": FORMAT, "version": VERSION, **msgspec.to_builtins(job)}
                lines = [f'"{name}": {json.dumps(value)}' for name, value in content.items()]
                file.write(("{" + ",\n ".join(lines) + "}\n").encode())
            publish(temporary, self.path / "job.json")
            then = self.read()
            assert then is not None
        if adopt:
            job = msgspec.structs.replace(job, batch_size=then.batch_size)
        job.check_same(then, self.path)
        return then

    def temporary(self, place: Path, name: str) -> Path:
        """A name in a folder that no other process has."""
        return place / f"{name}.{secrets.token_hex(8)}"

    def shard(self, job: Job, shard: int) -> Path:
        return self.path / job.shard_name(shard)

    def batch(self, shard: int, batch: range) -> Path:
        return self.unfinished / f"shard-{shard:06d}" / f"{batch.start}.tar"

    def published(self, job: Job) -> set[int]:
        """The shards that are there, by one listing."""
        name = re.compile(rf"shard-(\d{{6,}}){re.escape(SUFFIXES[job.format])}")
        found = {int(match[1]) for entry in os.scandir(self.path) if (match := name.fullmatch(entry.name))}
        return found & set(range(job.shards))
