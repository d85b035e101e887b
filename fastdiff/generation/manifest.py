"""manifest.jsonl: what the shards of a whole set are, derived from them alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from fastdiff.files import atomic_write, parse_json
from fastdiff.generation.formats import read_records, shard_sha256
from fastdiff.generation.job import Folder, Job


def manifest(place: Folder, job: Job) -> str:
    """A whole set's SHA-256, as manifest.jsonl says; it is derived where it is missing or damaged."""
    try:
        return str(parse_json(place.manifest.read_bytes().splitlines()[-1])["images_sha256"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return derive(place, job)


def derive(place: Folder, job: Job) -> str:
    """Write manifest.jsonl, a line a shard and one of the set; the set's SHA-256."""
    whole = hashlib.sha256()
    with atomic_write(place.manifest) as file:
        for shard in range(job.shards):
            of_shard, made_with, parts = hashlib.sha256(), [], 1
            for record in in_place(job, shard, read_records(job.format, place.shard(job, shard))):
                of_shard.update(line(record))
                whole.update(line(record))
                parts = max(parts, record.get("parts", 1))
                if record["made_with"] not in made_with:
                    made_with.append(record["made_with"])
            numbers = job.numbers(shard)
            told: dict[str, Any] = {
                "shard": job.shard_name(shard), "first": numbers.start, "images": len(numbers),
                "sha256": shard_sha256(job.format, place.shard(job, shard)), "images_sha256": of_shard.hexdigest(),
                "made_with": made_with,
            }  # fmt: skip
            if parts > 1:  # a batch that did not fit in the memory
                told["parts"] = parts
            file.write(json.dumps(told).encode() + b"\n")
        total = {"images": job.num, "images_sha256": whole.hexdigest()}
        file.write(json.dumps(total).encode() + b"\n")
    return whole.hexdigest()


def listed(place: Folder) -> dict[str, str]:
    """The SHA-256 of each shard that the manifest names; none where there is no manifest."""
    if not place.manifest.exists():
        return {}
    try:
        told = [parse_json(text) for text in place.manifest.read_bytes().splitlines()]
        return {entry["shard"]: entry["sha256"] for entry in told if "shard" in entry}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{place.manifest} cannot be read; remove it, and it is derived again: {error}") from None


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
