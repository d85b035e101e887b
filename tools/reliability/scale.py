"""What 10⁹ images on 1,000 workers would cost beside making them, from constants that are measured here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import BATCH, SHARD

import fastdiff
from fastdiff.files import publish
from fastdiff.generation.formats import read_tar, write_tar
from fastdiff.generation.job import Folder

NAMES = 50_000  # of shards that are listed
WRITTEN = 50  # shards that are published
LOOKED = 20_000


def scale(here: Path) -> dict[str, Any]:
    """Seconds an operation, on this machine's file system, and bytes."""
    fastdiff.generate(None, SHARD, here / "set", steps=1, shard_size=SHARD, batch_size=BATCH, device="cpu")
    place = Folder(here / "set")
    job = place.read()
    assert job is not None
    shard = place.shard(job, 0)
    entries = list(read_tar(shard))
    many = here / "many"
    many.mkdir()
    for number in range(NAMES):
        (many / f"shard-{number:06d}.tar").touch()

    def write_shards() -> None:
        for number in range(WRITTEN):
            write_tar(here / f"{number}.temporary", entries)
            publish(here / f"{number}.temporary", here / f"{number}.tar")

    listed = Folder(many)
    of_many = type(job)(**{**{name: getattr(job, name) for name in job.__struct_fields__}, "num": NAMES * SHARD})
    found = {
        "list_a_name": seconds(lambda: listed.published(of_many)) / NAMES,
        "look_at_a_name": seconds(lambda: [(many / f"shard-{i:06d}.tar").exists() for i in range(LOOKED)]) / LOOKED,
        "publish_a_shard": seconds(write_shards) / WRITTEN,
        "bytes_an_image": shard.stat().st_size / SHARD,
    }
    for file in os.scandir(many):
        os.unlink(file.path)
    return found


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
