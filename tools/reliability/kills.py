"""kill -9 at random moments, of workers and of what launched them; and two whole jobs on one folder."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import Launcher, Task, descendants, finished, kill, served, start, words_of

from fastdiff.generation.verify import Verified, verify

LEFT_OVER = 60.0  # seconds that workers of a killed launcher may go on


def killed(
    launcher: Launcher,
    out: Path,
    task: Task,
    kills: int,
    starting: float,
    making: float,
    rng: random.Random,
    sha256: str,
) -> dict[str, Any]:
    """A set whose makers are killed so often, and then left alone.

    One kill in ten is at a moment while processes start, which takes ``starting`` seconds, the others while they make
    images, which takes ``making``: evenly from the first file that they write. A set that is whole before its makers
    are killed is verified, and another one begun.
    """
    if (why := served(launcher)) is not None:
        return {"not_run": why}
    victims = {"worker": 0, "launcher": 0}
    wrong: list[str] = []
    sets, during = 1, 0
    left_over = 0.0
    place = out / "0"
    while sum(victims.values()) < kills:
        before = names(place)
        process = start(place, task, launcher)
        early = rng.random() < 0.1
        if not early:
            wait(lambda: names(place) != before, process)  # noqa: B023  called at once
        until = time.monotonic() + rng.random() * (starting if early else making)
        wait(lambda: time.monotonic() >= until, process)  # noqa: B023
        family = descendants(process.pid)
        workers = [number for number, words in family.items() if launcher.worker and launcher.worker in words]
        if process.poll() is None:
            worker = launcher.worker is None or (bool(workers) and rng.random() < 0.5)
            victims["worker" if worker else "launcher"] += 1
            during += not early
            kill(rng.choice(workers) if worker and workers else process.pid)
        process.communicate()
        if process.returncode == 2:
            raise SystemExit(f"asked wrongly: {process.args}")
        left_over = max(left_over, gone(family, launcher))
        if (place / "job.json").exists() and (damaged := verify(place).damaged):
            wrong += [f"{name}: {why}" for name, why in damaged.items()]
        if (place / "manifest.jsonl").exists() and sum(victims.values()) < kills:
            wrong += faults_of(verify(place), sha256)
            place = out / str(sets)
            sets += 1
    for _ in range(2):  # a worker that was left over may have been at torchrun's port
        if start(place, task, launcher).wait() == 0:
            break
    found = verify(place)
    wrong += faults_of(found, sha256)
    return {
        "num": task.num, "steps": task.steps, "kills": victims, "while_it_made": during, "sets": sets,
        "left_over": round(left_over, 1), "sha256": found.sha256, "right": not wrong, "wrong": wrong,
    }  # fmt: skip


def names(place: Path) -> set[str]:
    return {str(file) for file in place.rglob("*")}


def wait(until: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until it is so, or the process has ended."""
    while not until() and process.poll() is None:
        time.sleep(0.005)


def gone(family: dict[int, str], launcher: Launcher) -> float:
    """Seconds until a killed launcher's processes had ended; what has not after a minute is killed.

    Ray's agents outlive it, and write nothing of the set: they are killed once no actor is there.
    """
    agents = {number for number, words in family.items() if launcher.short == "ray" and "Agent" in words}
    began = time.monotonic()
    while time.monotonic() - began < LEFT_OVER:
        alive = {number for number, words in family.items() if running(number, words)}
        if alive <= agents:
            break
        time.sleep(0.05)
    waited = time.monotonic() - began
    for number in alive:
        kill(number)
    return waited


def running(number: int, words: str) -> bool:
    """Whether a process is still the one that it was: numbers are given again, and the dead wait for their parent.

    Ray's actors change their words with what they do.
    """
    try:
        now = words_of(number)
        return now == words != "" or (now.startswith("ray::") and words.startswith("ray::"))
    except OSError:
        return False


def faults_of(found: Verified, sha256: str) -> list[str]:
    """What is wrong with a set that should be whole."""
    if found.right and found.sha256 == sha256:
        rest = {path.name for path in found.path.iterdir() if not path.name.startswith("shard-")}
        return [] if rest == {"job.json", "manifest.jsonl"} else [f"{found.path.name} holds {sorted(rest)}"]
    return [str(found) if not found.right else f"{found.path.name}: another SHA-256: {found.sha256}"]


def two_jobs(out: Path, task: Task, sha256: str) -> dict[str, Any]:
    jobs = [start(out, task), start(out, task)]
    for job in jobs:
        finished(job)
    wrong = faults_of(verify(out), sha256)
    return {"num": task.num, "steps": task.steps, "sha256": verify(out).sha256, "right": not wrong, "wrong": wrong}
