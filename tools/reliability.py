"""What `fastdiff generate` stands: kills by the dozen, two jobs at once, a long run; writes RELIABILITY.md.

    python tools/reliability.py --num 2000 --kills 50 --long 100000 --report RELIABILITY.md

Each launcher makes one set, and is killed (kill -9: a worker, or the launcher itself) at random moments until it was
killed so often; then it is left alone. In the end every number is there once, every hash is right, and the set's
SHA-256 is that of a run that nothing disturbed. A full disk, a process that hangs, networks that fail and damaged
shards are tests: `pytest -m "" tests/generation`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import fastdiff  # noqa: E402  this checkout's, whatever is installed
from fastdiff.generation.job import Folder  # noqa: E402
from fastdiff.generation.verify import Verified, verify  # noqa: E402

LAUNCHERS = {"one process": 1, "torchrun, 2 ranks": 2, "torchrun, 4 ranks": 4}
STEPS, SHARD, BATCH = 10, 64, 16


def command(out: Path, num: int, ranks: int) -> list[str]:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0"]
    grid = ["--steps", str(STEPS), "--shard-size", str(SHARD), "--batch-size", str(BATCH)]
    asked = ["generate", "-n", str(num), "--out", str(out), *grid, "--device", "cpu", "--quiet"]
    return [sys.executable, *launcher, "-m", "fastdiff", *asked]


def start(out: Path, num: int, ranks: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # as torchrun has it
    return subprocess.Popen(command(out, num, ranks), env=environment, stderr=subprocess.DEVNULL)


def children(parent: int) -> list[int]:
    """The processes that a process started, by /proc."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(place.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(place.parent.name))
        except (OSError, ValueError, IndexError):  # it has ended
            continue
    return found


def killed(out: Path, num: int, ranks: int, kills: int, seconds: float, rng: random.Random) -> tuple[Verified, str]:
    """A set whose makers are killed so often, and what was killed how often."""
    victims = {"worker": 0, "launcher": 0}
    whole = 0  # sets: a run may be done before it is killed
    place = out / "0"
    while sum(victims.values()) < kills:
        launcher = start(place, num, ranks)
        until = time.monotonic() + rng.random() * seconds
        while time.monotonic() < until and launcher.poll() is None:
            time.sleep(0.01)
        workers = children(launcher.pid)
        if launcher.poll() is None:
            worker = bool(workers) and rng.random() < 0.5
            victims["worker" if worker or ranks == 1 else "launcher"] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers) if worker else launcher.pid, signal.SIGKILL)
        launcher.wait()
        if Folder(place).read() is not None and (found := verify(place)).damaged:
            return found, "damaged"
        if launcher.returncode == 2:
            raise SystemExit(f"{' '.join(launcher.args)} was asked wrongly")  # type: ignore[arg-type]
        if Folder(place).manifest.exists() and sum(victims.values()) < kills:
            whole += 1
            place = out / str(whole)
    for _ in range(2):  # a rank that was left over may end torchrun's first try
        if start(place, num, ranks).wait() == 0:
            break
    told = ", ".join(f"{count} of a {name}" for name, count in victims.items() if count)
    return verify(place), f"{told}, over {whole + 1} sets"


def long_run(out: Path, num: int) -> list[str]:
    """Resident memory at a tenth and at the end, and images a second beside a bare loop that keeps nothing."""
    trained = fastdiff.models.digits()

    def bare(batches: int) -> float:
        began = time.perf_counter()
        for i in range(batches):
            numbers = torch.arange(i * BATCH, (i + 1) * BATCH)
            told = trained.arguments(numbers % 10, None, steps=STEPS)
            fastdiff.sample(trained.unet, (BATCH, *trained.image_shape), sample_offset=i * BATCH, **told)
        return batches * BATCH / (time.perf_counter() - began)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    seen: list[tuple[int, float]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            if (out / "job.json").exists():
                place = Folder(out)
                seen.append((len(place.published(place.read())), resident()))  # type: ignore[arg-type]

    bare(2)
    rate = bare(max(2, num // BATCH // 20))
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    fastdiff.generate(
        trained, num, out, steps=STEPS, shard_size=SHARD * 4, batch_size=BATCH, format="tar", device="cpu"
    )
    made = num / (time.perf_counter() - began)
    ended.set()
    watcher.join()
    rate = (rate + bare(max(2, num // BATCH // 20))) / 2
    shards = -(-num // (SHARD * 4))
    tenth = next((memory for count, memory in seen if count >= shards / 10), resident())
    return [
        f"- {num:,} digits in one run: {tenth:,.0f} MB resident at a tenth, {resident():,.0f} MB at the end.",
        f"- {made:,.1f} images a second; a bare loop of `fastdiff.sample` over the same batches, before and after it, "
        f"{rate:,.1f}: {made / rate:.3f} of it.",
    ]


def two_jobs(out: Path, num: int) -> Verified:
    jobs = [start(out, num, 1), start(out, num, 1)]
    codes = [job.wait() for job in jobs]
    found = verify(out)
    assert codes == [0, 0], codes
    return found


def verdict(found: Verified, sha256: str | None) -> str:
    if found.right and found.sha256 == sha256:
        return "every number once, every hash right, the same SHA-256"
    return f"WRONG: {found}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--long", type=int, default=100_000, help="images of the long run; 0 leaves it out")
    parser.add_argument("--launchers", default=",".join(map(str, LAUNCHERS.values())), help="numbers of ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=ROOT / "RELIABILITY.md")
    asked: Any = parser.parse_args()
    rng, rows = random.Random(asked.seed), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        began = time.monotonic()
        assert start(here / "straight", asked.num, 1).wait() == 0
        seconds, straight = time.monotonic() - began, verify(here / "straight")
        ranks = [int(word) for word in asked.launchers.split(",")]
        cases: list[tuple[str, Callable[[], tuple[Verified, str]]]] = [
            (name, lambda name=name, n=n: killed(here / f"ranks-{n}", asked.num, n, asked.kills, seconds, rng))  # type: ignore[misc]
            for name, n in LAUNCHERS.items() if n in ranks
        ]  # fmt: skip
        cases.append(("two whole jobs at once", lambda: (two_jobs(here / "two", asked.num), "none")))
        for name, case in cases:
            found, told = case()
            rows.append(f"| {name} | {told} | {verdict(found, straight.sha256)} |")
            print(rows[-1], flush=True)
        long = long_run(here / "long", asked.long) if asked.long else []
    text = [
        "# What `fastdiff generate` stands", "",
        f"Written by `python tools/reliability.py --num {asked.num} --kills {asked.kills} --long {asked.long}` on "
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; sets of {asked.num:,} digits, "
        f"{STEPS} steps of DDIM, shards of {SHARD}, batches of {BATCH}.", "",
        f"SHA-256 of the undisturbed set: `{straight.sha256}`.", "",
        "| who makes the set | kill -9 | in the end |", "|---|---|---|", *rows, "", *long, "",
        "A full disk, a process that hangs, networks that fail, a launcher that is killed, damaged shards: "
        "`pytest -m \"\" tests/generation`.", "",
    ]  # fmt: skip
    asked.report.write_text("\n".join(text))
    return int("WRONG" in "".join(rows))


if __name__ == "__main__":
    sys.exit(main())
