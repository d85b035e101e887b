"""What `fastdiff generate` stands: kills, faults, a long run, scale on paper; measures, and writes RELIABILITY.md.

    python tools/reliability                                   # all of it; hours
    python tools/reliability --only kills --kills 12 --num 500
    python tools/reliability --only long --long 100000         # on a machine that nothing else uses
    python tools/reliability --render                          # only the page, from measured.json

Every part replaces what measured.json had of it, and is written down as soon as it was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's package, whatever is installed

import torch  # noqa: E402
from faults import FAULTS  # noqa: E402
from kills import killed, names, two_jobs, wait  # noqa: E402
from long_run import long_run  # noqa: E402
from processes import LAUNCHERS, Task, finished, start  # noqa: E402
from report import render  # noqa: E402
from scale import scale  # noqa: E402

from fastdiff.generation.verify import verify  # noqa: E402

MEASURED = HERE / "measured.json"
PARTS = ("kills", "faults", "long", "scale")


def main() -> int:
    asked = arguments()
    torch.set_num_threads(1)  # as the processes that are started have it
    if asked.scratch is not None:
        asked.scratch.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = json.loads(asked.measured.read_text()) if asked.measured.exists() else {}
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        here = Path(folder)
        for part, case, measure in () if asked.render else cases(asked, here):
            began = time.monotonic()
            found = measure()
            found |= {"seconds": round(time.monotonic() - began, 1), "machine": machine()}
            measured.setdefault(part, {})[case] = found
            asked.measured.write_text(json.dumps(measured, indent=1) + "\n")
            print(f"{part}: {case}: {json.dumps(found)}", flush=True)
    asked.report.write_text(render(measured))
    every = [case for part in measured.values() for case in part.values()]
    return int(any(case.get("right") is False for case in every))


def cases(asked: argparse.Namespace, here: Path) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """What is to be measured: the part, the case, and the function that measures it."""
    rng, task = random.Random(asked.seed), Task(asked.num, asked.steps)
    found: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    if "kills" in asked.only or "faults" in asked.only:
        starting, making, sha256 = undisturbed(here / "straight", task)
        print(f"undisturbed: {starting:.1f} s to start, {making:.1f} s to make, sha256 {sha256}", flush=True)
    if "kills" in asked.only:
        for name, launcher in LAUNCHERS.items():
            if name in asked.launchers:
                how = (launcher, here / launcher.short, task, asked.kills, starting, making, rng, sha256)
                found.append(("kills", name, lambda how=how: killed(*how)))
        found.append(("kills", "two whole jobs at once", lambda: two_jobs(here / "two", task, sha256)))
    if "faults" in asked.only:
        for name, fault in FAULTS.items():
            if not asked.faults or name in asked.faults:
                place = here / fault.__name__
                found.append(("faults", name, lambda fault=fault, p=place: fault(p, task, sha256, rng)))
    if "long" in asked.only:
        found.append(("long", "long", lambda: long_run(here / "long", asked.long, asked.long_steps)))
    if "scale" in asked.only:
        found.append(("scale", "scale", lambda: scale(here / "scale")))
    return found


def undisturbed(place: Path, task: Task) -> tuple[float, float, str]:
    """Seconds until the first file of a run that nothing disturbs, and from there to its end; its set's SHA-256."""
    began = time.monotonic()
    process = start(place, task)
    wait(lambda: bool(names(place)), process)
    first = time.monotonic()
    finished(process)
    found = verify(place)
    assert found.sha256 is not None, found
    return first - began, time.monotonic() - first, found.sha256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--num", type=int, default=2000, help="digits of each set that is killed or disturbed")
    parser.add_argument("--steps", type=int, default=5, help="of dpmpp_2m, for those")
    parser.add_argument("--kills", type=int, default=50, help="of each launcher")
    parser.add_argument("--launchers", nargs="+", choices=list(LAUNCHERS), default=list(LAUNCHERS))
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), help="some of them")
    parser.add_argument("--long", type=int, default=100_000, help="digits of the long run")
    parser.add_argument("--long-steps", type=int, help="of its sampler; by default the model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--scratch", type=Path, help="where sets are made")
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--report", type=Path, default=ROOT / "RELIABILITY.md")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    return parser.parse_args()


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {cores} of {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
