"""The processes that make a set, as somebody starts them, and those that they start."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARD, BATCH = 64, 16


@dataclass(frozen=True)
class Task:
    """Which set: so many digits, of the same noise and on the same grid whoever makes them."""

    num: int
    steps: int

    def arguments(self, out: Path) -> list[str]:
        grid = ["--steps", str(self.steps), "--shard-size", str(SHARD), "--batch-size", str(BATCH)]
        asked = ["generate", "-n", str(self.num), "--out", str(out), "--sampler", "dpmpp_2m", "--guidance", "1"]
        return [*asked, *grid, "--device", "cpu", "--quiet"]


@dataclass(frozen=True)
class Launcher:
    """What starts the workers. before: the words before ``-m fastdiff``; after: those after its own.

    worker: what a worker's command line has in it; None where the launcher is the worker.
    """

    short: str
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    worker: str | None = None


def _torchrun(ranks: int) -> Launcher:
    before = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0"]
    return Launcher(f"torchrun-{ranks}", before, worker="fastdiff")


LAUNCHERS = {
    "one process": Launcher("one"),
    "torchrun, 2 ranks": _torchrun(2),
    "torchrun, 4 ranks": _torchrun(4),
    "Ray, 3 actors": Launcher("ray", after=["--engine", "ray", "--workers", "3"], worker="ray::Maker"),
}
ONE = LAUNCHERS["one process"]

# In the place of `-m fastdiff`, where something in the process is to be disturbed first.
DISTURBED = "{disturbance}\nfrom fastdiff.cli import app\napp()"


def served(launcher: Launcher) -> str | None:
    """Why this tree or this machine cannot run a launcher; None where it can."""
    if "--engine" not in launcher.after:
        return None
    try:
        import ray  # noqa: F401
    except ImportError:
        return "ray is not installed"
    said = subprocess.run(
        [sys.executable, "-m", "fastdiff", "generate", "--help"], capture_output=True, text=True, env=environment()
    )
    return None if "--engine" in said.stdout else "`fastdiff generate` has no --engine"


def environment() -> dict[str, str]:
    """Ray leaves a processor to the tasks that feed actors: for three, four are claimed, whatever there is."""
    claimed = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 4}'}
    return {**os.environ, **claimed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def start(
    out: Path, task: Task, launcher: Launcher = ONE, *, disturbance: str | None = None, more: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    program = ["-m", "fastdiff"] if disturbance is None else ["-c", DISTURBED.format(disturbance=disturbance)]
    words = [sys.executable, *launcher.before, *program, *task.arguments(out), *launcher.after, *more]
    return subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def finished(process: subprocess.Popen[str], codes: tuple[int, ...] = (0,)) -> str:
    """What it said on standard error; AssertionError for another exit code."""
    _, said = process.communicate()
    assert process.returncode in codes, f"exit code {process.returncode}, and not {codes}: {said[-2000:]}"
    return said


def kill(number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


def descendants(parent: int) -> dict[int, str]:
    """The command lines of all processes that a process has started, and those of theirs, by /proc."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
            children.setdefault(int(place.read_text().rpartition(")")[2].split()[1]), []).append(int(place.parent.name))
    found, waiting = {}, [parent]
    while waiting:
        for number in children.get(waiting.pop(), []):
            waiting.append(number)
            with contextlib.suppress(OSError):
                found[number] = words_of(number)
    return found


def words_of(number: int) -> str:
    """A process's command line. Raises OSError where there is none of this number; empty of one that has ended."""
    return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
