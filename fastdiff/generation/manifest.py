"""manifest.jsonl: what the shards of a whole set are, derived from them alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastdiff.files import atomic_write, parse_json
from fastdiff.generation.formats import read_records, shard_sha256
from fastdiff.generation.job import MANIFEST, Folder, Job


def manifest(place: Folder, job: Job) -> str:
    """A whole set's SHA-256, as manifest.jsonl says; it is derived where it is missing or damaged."""
    try:
        return str(parse_json((place.store.read(MANIFEST) or b"").splitlines()[-1])["images_sha256"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return derive(place, job)


def derive(place: Folder, job: Job) -> str:
    """Write manifest.jsonl, a line a shard and one of the set; the set's SHA-256."""
    whole = hashlib.sha256()
    with tempfile.TemporaryFile() as lines:
        for shard in range(job.shards):
            lines.write(json.dumps(_of_shard(place, job, shard, whole)).encode() + b"\n")
        lines.write(json.dumps({"images": job.num, "images_sha256": whole.hexdigest()}).encode() + b"\n")

        def write(path: Path) -> None:
            lines.seek(0)
            with atomic_write(path) as file:
                shutil.copyfileobj(lines, file)

        place.store.replace(MANIFEST, write)
    return whole.hexdigest()


def _of_shard(place: Folder, job: Job, shard: int, whole: Any) -> dict[str, Any]:
    """What a shard holds; its images are added to the digest of the whole set."""
    of_shard, made_with, parts, prompts = hashlib.sha256(), [], 1, []
    with place.store.local(job.shard_name(shard)) as path:
        for record in in_place(job, shard, read_records(job.format, path)):
            of_shard.update(line(record))
            whole.update(line(record))
            parts = max(parts, record.get("parts", 1))
            if record["made_with"] not in made_with:
                made_with.append(record["made_with"])
            if "prompt" in record:
                prompts.append(record["prompt"])
        sha256 = shard_sha256(job.format, path)
    numbers = job.numbers(shard)
    told: dict[str, Any] = {
        "shard": job.shard_name(shard), "first": numbers.start, "images": len(numbers), "sha256": sha256,
        "images_sha256": of_shard.hexdigest(), "made_with": made_with,
    }  # fmt: skip
    if prompts:
        told["prompts"] = prompts
    if parts > 1:  # a batch that did not fit in the memory
        told["parts"] = parts
    return told


def listed(place: Folder) -> dict[str, str]:
    """The SHA-256 of each shard that the manifest names; none where there is no manifest."""
    text = place.store.read(MANIFEST)
    if text is None:
        return {}
    try:
        told = [parse_json(line) for line in text.splitlines()]
        return {entry["shard"]: entry["sha256"] for entry in told if "shard" in entry}
    except (ValueError, TypeError, KeyError) as error:
        told_of = f"{place.path}/{MANIFEST}"
        raise ValueError(f"{told_of} cannot be read; remove it, and it is derived again: {error}") from None


def in_place(job: Job, shard: int, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records of a shard, which must be those that the job has there, each once, in order."""
    numbers, same = iter(job.numbers(shard)), (job.plan_sha256, job.recipe["arguments"]["seed"])
    for record in records:
        if record.get("number") != (number := next(numbers, None)):
            raise ValueError(f"it has image {record.get('number')} in the place of {number}")
        if (record["plan"], record["seed"]) != same:
            raise ValueError(f"image {number} is of another plan or seed")
        yield record
    if (number := next(numbers, None)) is not None:
        raise ValueError(f"it has not image {number}")


def line(record: dict[str, Any]) -> bytes:
    """What an image adds to a set's SHA-256."""
    return f"{record['number']} {record['sha256']}\n".encode()
