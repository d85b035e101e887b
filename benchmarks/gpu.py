"""``make gpu``: everything that needs a GPU, on the machine that has one, in less than 560 seconds.

    python benchmarks/gpu.py [--dry-run] [--only STAGE …]

Stages run one after another, each with a time budget; a later one gets what the earlier ones left. Benchmarks start
their most important contests first and stop starting them 20 s before their time is over; a stage that goes on is
interrupted, upon which pytest still writes what it has measured, and killed 15 s later.
What was skipped or cut short is said on the terminal and in gpu.log. The files go to $OUT, or to benchmarks/results:
gpu.log (what ran, and its output), gpu.json (what was measured, written after each stage) and, rendered from it,
SPEED.md with gpu.png.
Needs no network, and no package beyond torch, pytest, pytest-benchmark and the build's requirements; tests run in eight
processes where pytest-xdist is installed, and networks are compared where diffusers is.
Exits with status 1 where a stage failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 555.0  # seconds
KEPT = 100_000  # characters of a stage's output, its end
MARGIN = 20.0  # seconds before a stage's end after which no contest starts
GRACE = 15.0  # seconds from the interrupt to the end
# In order of importance. bench_samplers.py compares steps of schedulers on a CPU, for which there is no time here.
FILES = ("unet", "group_norm_silu", "attention", "sample", "update", "add_noise", "randn")


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    command: list[str]
    needs: str | None = None  # a program that must be there
    environment: tuple[tuple[str, str], ...] = ()
    measured: Path | None = None  # the file to which it writes what it measured


def stages(out: Path) -> list[Stage]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    parallel = ["-n", "8", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    seed = str(int.from_bytes(os.urandom(4), "little") >> 1)  # all processes must collect the same random cases

    def bench(name: str, seconds: float, *arguments: str, **environment: str) -> Stage:
        part = out / f".{name}.part.json"
        command = [*pytest, *arguments, f"--benchmark-json={part}"]
        return Stage(name, seconds, command, environment=tuple(environment.items()), measured=part)

    return [
        Stage("build", 60, [python, "setup.py", "build_ext", "--inplace"], "nvcc", (("FASTDIFF_CUDA", "ON"),)),
        # The longest test first.
        Stage(
            "tests", 150, [*pytest, *parallel, "-m", "gpu", "tests/ops/test_triton.py", "tests"],
            environment=(("FASTDIFF_TEST_SEED", seed),),
        ),
        Stage(
            "sanitizer", 60,
            [find("compute-sanitizer"), "--tool=memcheck", "--error-exitcode=3", python, "benchmarks/sanitize.py"],
            "compute-sanitizer",
        ),
        bench("bench", 150, *(f"benchmarks/bench_{name}.py" for name in FILES), "-k", "not test_compile"),
        # CUPTI is not torn down between two profiles: live CUDA graphs may not survive that.
        bench("launches", 45, "benchmarks/bench_launches.py", TEARDOWN_CUPTI="0", DISABLE_CUPTI_LAZY_REINIT="1"),
        bench("compile", 200, "benchmarks/bench_unet.py", "-k", "test_compile"),
        Stage("report", 20, [python, "benchmarks/report.py", str(out / "gpu.json"), "--out", str(out / "SPEED.md")]),
    ]  # fmt: skip


def find(program: str) -> str:
    """A program on the PATH or in the usual places of a CUDA toolkit, or its bare name."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    places = os.pathsep.join([os.environ.get("PATH", ""), str(home / "bin"), str(home / "compute-sanitizer")])
    return shutil.which(program, path=places) or program


@dataclass(frozen=True)
class Outcome:
    result: str
    seconds: float = 0.0
    output: str = ""


def run(stage: Stage, seconds: float) -> Outcome:
    """One stage, interrupted where its time is over, and ended with all its children."""
    environment = {**os.environ, **dict(stage.environment), "FASTDIFF_BENCH_SECONDS": str(max(1.0, seconds - MARGIN))}
    program = stage.needs and find(stage.needs)
    if program and not shutil.which(program):
        return Outcome(f"skipped, {stage.needs} is not installed")
    if program:
        environment["PATH"] = os.pathsep.join([environment.get("PATH", ""), str(Path(program).parent)])
    started = time.monotonic()
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds - GRACE))
        result = "passed" if process.returncode == 0 else f"failed (exit code {process.returncode})"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        result = f"cut short after {seconds - GRACE:.0f} s"
        try:
            output, _ = process.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    return Outcome(result, time.monotonic() - started, output)


def add(measured: Path, content: dict[str, Any] | None) -> dict[str, Any] | None:
    """What was measured so far, with what a stage has added in its file, which is removed."""
    try:
        more: dict[str, Any] = json.loads(measured.read_text())
    except (OSError, ValueError):
        return content
    finally:
        measured.unlink(missing_ok=True)
    # A contest that was interrupted has no results.
    benchmarks = [b for b in more["benchmarks"] if "contestants" in b["extra_info"]]
    if content is not None:
        return {**content, "benchmarks": content["benchmarks"] + benchmarks}
    return {**more, "benchmarks": benchmarks}


def write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def gpu() -> str | None:
    """The GPU's name and driver, or None."""
    try:
        found = subprocess.run(
            [find("nvidia-smi"), "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="list the stages and stop")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages only")
    arguments = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").resolve()
    chosen = [stage for stage in stages(out) if not arguments.only or stage.name in arguments.only]
    if arguments.dry_run:
        for stage in chosen:
            print(f"{stage.name:10} at most {stage.seconds:3.0f} s  {' '.join(stage.command)}")
        return 0
    name = gpu()
    if name is None:
        print("make gpu needs an NVIDIA GPU, and nvidia-smi finds none", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log, results = f"{name}\n", []
    content: dict[str, Any] | None = None
    for stage in chosen:
        kept = 0.0 if stage is chosen[-1] else chosen[-1].seconds  # the report's time is its own
        left = min(stage.seconds, TOTAL - kept - (time.monotonic() - started))
        outcome = run(stage, left) if left > 2 * GRACE or stage is chosen[-1] else Outcome("skipped, no time is left")
        line = f"{stage.name}: {outcome.result}, {outcome.seconds:.1f} s"
        print(line, flush=True)
        log += f"\n==== {line}\n{outcome.output[-KEPT:]}"
        write(out / "gpu.log", log)
        results.append(outcome.result)
        if stage.measured is not None:
            content = add(stage.measured, content)
            if content is not None:
                write(out / "gpu.json", json.dumps(content, indent=1) + "\n")
    return int(any(result != "passed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
