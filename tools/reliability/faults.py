"""What else befalls a job: disks, clocks, processes that hang, networks that fail, bytes that change.

Each function makes one set under one fault, lets the same command make the rest, and says what came of it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kills import faults_of
from processes import BATCH, SHARD, Task, finished, start

from fastdiff.generation.verify import verify

Found = dict[str, Any]


def disk_full(place: Path, task: Task, sha256: str, rng: random.Random) -> Found:
    with small_disk(f"{2 * task.num}k") as (disk, why):
        if why:
            return {"not_run": why}
        said = finished(start(disk / "set", task), codes=(1,))
        told = "No space left on device" in said and "Traceback" not in said
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        return resumed(disk / "set", task, sha256, told, said)


def read_only(place: Path, task: Task, sha256: str, rng: random.Random) -> Found:
    with small_disk("1g") as (disk, why):
        if why:
            return {"not_run": why}
        process = start(disk / "set", task)
        wait_for(disk / "set", process)
        while subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
            time.sleep(0.01)  # while a file is open
        said = finished(process, codes=(1,))
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        return resumed(disk / "set", task, sha256, "Read-only file system" in said and "Traceback" not in said, said)


def hangs(place: Path, task: Task, sha256: str, rng: random.Random) -> Found:
    """The first of two processes is stopped, and goes on when all is done."""
    ranks = [start(place, task, more=("--rank", str(rank), "--world-size", "2")) for rank in range(2)]
    wait_for(place, ranks[0])
    os.kill(ranks[0].pid, signal.SIGSTOP)
    try:
        finished(ranks[1])
        wrong = faults_of(verify(place), sha256)
    finally:
        os.kill(ranks[0].pid, signal.SIGCONT)
    finished(ranks[0])
    return outcome(wrong + faults_of(verify(place), sha256), "the other process made all; both ended with 0")


FAILING = """
import torch
from fastdiff.pictures.recipe import Recipe
sample = Recipe.sample
def failing(self, *args, **how):
    if self.arguments.get("sample_offset") == {start}:
        {failure}
    return sample(self, *args, **how)
Recipe.sample = failing
"""


def network_raises(place: Path, task: Task, sha256: str, rng: random.Random) -> Found:
    return network_fails(place, task, sha256, rng, "raise RuntimeError('no such kernel')", "no such kernel")


def network_nan(place: Path, task: Task, sha256: str, rng: random.Random) -> Found:
    return network_fails(place, task, sha256, rng, "return torch.full(self.shape, float('nan'))", "NaN or infinity")


def network_fails(place: Path, task: Task, sha256: str, rng: random.Random, failure: str, words: str) -> Found:
    start_of_batch = rng.randrange(1, task.num // BATCH) * BATCH
    disturbance = FAILING.format(start=start_of_batch, failure=failure)
    said = finished(start(place, task, disturbance=disturbance), codes=(1,))
    name = f"shard-{start_of_batch // SHARD:06d}.tar"
    alone = verify(place).missing == (name,) and not verify(place).damaged
    return resumed(place, task, sha256, alone and name in said and words in said, said)


CLOCK = """
import random, time
now = time.time
time.time = lambda: now() + random.uniform(-3e7, 3e7)
"""


def clock_jumps(place: Path, task: Task, sha256: str, rng: random.Random) -> Found:
    """Python's clock jumps by up to a year with every look, and the files' times anywhere from 1970 to 2100; the job is
    killed once in between.
    """
    process = start(place, task, disturbance=CLOCK)
    wait_for(place, process)
    set_times(place, rng)
    process.kill()
    process.communicate()
    again = start(place, task, disturbance=CLOCK)
    while again.poll() is None:
        set_times(place, rng)
        time.sleep(0.2)
    finished(again)
    return outcome(faults_of(verify(place), sha256), "killed once, resumed")


def damaged(place: Path, task: Task, sha256: str, rng: random.Random) -> Found:
    """A bit in one shard, the end of another, all of a third."""
    finished(start(place, task))
    chosen = sorted(rng.sample(range(task.num // SHARD), 3))
    shards = [place / f"shard-{number:06d}.tar" for number in chosen]
    flipped = bytearray(shards[0].read_bytes())
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    shards[0].write_bytes(flipped)
    os.truncate(shards[1], rng.randrange(shards[1].stat().st_size))
    shards[2].write_bytes(b"")
    found = verify(place, discard=True)
    right = set(found.damaged) == {shard.name for shard in shards}
    return resumed(place, task, sha256, right, f"found {sorted(found.damaged)} of {[shard.name for shard in shards]}")


FAULTS: dict[str, Callable[[Path, Task, str, random.Random], Found]] = {
    "the disk is full": disk_full,
    "the folder turns read-only": read_only,
    "one of two processes hangs": hangs,
    "the network raises in one batch": network_raises,
    "the network returns NaN in one batch": network_nan,
    "the clock jumps": clock_jumps,
    "three shards are damaged": damaged,
}


# ---- what they share


def resumed(place: Path, task: Task, sha256: str, told: bool, said: str) -> Found:
    """After the fault: the same command makes the rest."""
    before = verify(place)
    wrong = [] if told else [f"it said: {said[-500:]}"]
    wrong += [f"{name}: {why}" for name, why in before.damaged.items()]
    finished(start(place, task))
    missing = f"{len(before.missing)} shards were missing, and the same command made them"
    return outcome(wrong + faults_of(verify(place), sha256), f"said in words; {missing}")


def outcome(wrong: list[str], told: str) -> Found:
    return {"right": not wrong, "wrong": wrong, "told": told}


def wait_for(place: Path, process: subprocess.Popen[str]) -> None:
    """Until a shard is there and another one is being made."""
    while not (list(place.glob("shard-*")) and list(place.glob(".unfinished/shard-*/*.tar"))):
        assert process.poll() is None, "it ended before it was disturbed"
        time.sleep(0.005)


def set_times(place: Path, rng: random.Random) -> None:
    for file in place.rglob("*"):
        with contextlib.suppress(OSError):  # it has another name by now
            os.utime(file, (rng.uniform(0, 4.1e9), rng.uniform(0, 4.1e9)))


@contextlib.contextmanager
def small_disk(size: str) -> Iterator[tuple[Path, str | None]]:
    """A tmpfs, or why there can be none."""
    disk = Path(tempfile.mkdtemp())
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    try:
        yield disk, (mounted.stderr.strip() or "mount failed") if mounted.returncode else None
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        disk.rmdir()
