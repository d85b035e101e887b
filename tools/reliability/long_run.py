"""One long run: its memory at a tenth and at the end, and its speed beside a bare loop that keeps nothing."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from processes import SHARD

import fastdiff
from fastdiff.generation.job import Folder

SHARD_SIZE, BATCH = 16 * SHARD, 64
LOOKS = 0.5  # seconds between looks at the memory


def long_run(out: Path, num: int, steps: int | None) -> dict[str, Any]:
    """Seconds are of the wall clock and of the processor, writer thread included; the bare loop runs before and after
    the run, over a twentieth of its batches each.
    """
    trained = fastdiff.models.digits()
    changes = {} if steps is None else {"steps": steps}

    def bare(batches: int) -> tuple[float, float]:
        began = time.perf_counter(), time.process_time()
        for i in range(batches):
            numbers = torch.arange(i * BATCH, (i + 1) * BATCH)
            told = trained.arguments(numbers % 10, None, **changes)
            fastdiff.sample(trained.unet, (BATCH, *trained.image_shape), sample_offset=i * BATCH, **told)
        seconds = time.perf_counter() - began[0], time.process_time() - began[1]
        return tuple(batches * BATCH / each for each in seconds)  # type: ignore[return-value]

    seen: list[tuple[int, float]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOKS):
            if (out / "job.json").exists():
                place = Folder(out)
                seen.append((len(place.published(place.read())), resident()))  # type: ignore[arg-type]

    batches = max(2, num // BATCH // 20)
    bare(2)
    before = bare(batches)
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter(), time.process_time()
    fastdiff.generate(trained, num, out, shard_size=SHARD_SIZE, batch_size=BATCH, device="cpu", **changes)
    made = num / (time.perf_counter() - began[0]), num / (time.process_time() - began[1])
    ended.set()
    watcher.join()
    after = bare(batches)
    shards = -(-num // SHARD_SIZE)
    tenth = next((memory for count, memory in seen if count >= shards / 10), resident())
    whole = seen[-1][1] if seen else resident()
    ratios = [each / ((a + b) / 2) for each, a, b in zip(made, before, after, strict=True)]
    return {
        "num": num, "steps": steps or trained.sampling.get("steps"), "resident_tenth": round(tenth, 1),
        "resident_end": round(whole, 1), "rate": made[0], "bare_before": before[0], "bare_after": after[0],
        "ratio": ratios[0], "ratio_of_processor_time": ratios[1],
        "right": abs(whole / tenth - 1) <= 0.05 and ratios[0] >= 0.97,
    }  # fmt: skip


def resident() -> float:
    """Megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
