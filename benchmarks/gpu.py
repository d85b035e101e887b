"""``make gpu``: everything that needs a GPU, on the machine that has one, in under nine minutes.

    python benchmarks/gpu.py [--dry-run]

Stages run in order of importance, each with a time budget; a later one gets what the earlier ones left. What was
skipped or cut short is said on the terminal and in gpu.json. The files, at most eight, go to $OUT, or to
benchmarks/results: gpu.json (what ran), one log a stage, bench.json and the rendered SPEED.md with bench.png.
Needs no network, and no package beyond torch, pytest, pytest-benchmark and the build's requirements.
Exits with status 1 where a stage failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 530.0  # seconds
KEPT = 200_000  # characters of a log, its end


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    command: list[str]
    needs: str | None = None  # a program that must be there
    environment: tuple[tuple[str, str], ...] = ()


def stages(out: Path) -> list[Stage]:
    python, measured, speed = sys.executable, str(out / "bench.json"), str(out / "SPEED.md")
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return [
        Stage("build", 120, [python, "setup.py", "build_ext", "--inplace"], "nvcc", (("FASTDIFF_CUDA", "ON"),)),
        Stage("tests", 150, [*pytest, "-m", "gpu"]),
        Stage(
            "sanitizer", 90,
            [find("compute-sanitizer"), "--tool=memcheck", "--error-exitcode=3", python, "benchmarks/sanitize.py"],
            "compute-sanitizer",
        ),
        # bench_samplers.py compares steps of schedulers on a CPU, for which there is no time here.
        Stage(
            "bench", 240,
            [*pytest, "benchmarks", "--ignore=benchmarks/bench_samplers.py", f"--benchmark-json={measured}"],
        ),
        Stage("report", 30, [python, "benchmarks/report.py", measured, "--out", speed]),
    ]  # fmt: skip


def find(program: str) -> str:
    """A program on the PATH or in the usual places of a CUDA toolkit, or its bare name."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    places = os.pathsep.join([os.environ.get("PATH", ""), str(home / "bin"), str(home / "compute-sanitizer")])
    return shutil.which(program, path=places) or program


def run(stage: Stage, seconds: float, out: Path) -> dict[str, object]:
    """One stage, ended with all its children where its time is over."""
    environment = {**os.environ, **dict(stage.environment)}
    program = stage.needs and find(stage.needs)
    if program and not shutil.which(program):
        return {"stage": stage.name, "result": "skipped", "why": f"{stage.needs} is not installed"}
    if program:
        environment["PATH"] = os.pathsep.join([environment.get("PATH", ""), str(Path(program).parent)])
    started = time.monotonic()
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=seconds)
        result = "passed" if process.returncode == 0 else f"failed (exit code {process.returncode})"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        result = f"cut short after {seconds:.0f} s"
    if text:
        write(out / f"{stage.name}.log", text[-KEPT:])
    return {"stage": stage.name, "result": result, "seconds": round(time.monotonic() - started, 1)}


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
    arguments = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").resolve()
    if arguments.dry_run:
        for stage in stages(out):
            print(f"{stage.name:10} at most {stage.seconds:3.0f} s  {' '.join(stage.command)}")
        return 0
    name = gpu()
    if name is None:
        print("make gpu needs an NVIDIA GPU, and nvidia-smi finds none", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    started, done = time.monotonic(), []
    for stage in stages(out):
        left = min(stage.seconds, TOTAL - (time.monotonic() - started))
        if left < 10:
            outcome: dict[str, object] = {"stage": stage.name, "result": "skipped", "why": "no time is left"}
        else:
            print(f"{stage.name} …", flush=True)
            outcome = run(stage, left, out)
        done.append(outcome)
        print(f"{stage.name}: {outcome['result']}" + (f", {outcome['why']}" if "why" in outcome else ""), flush=True)
        write(out / "gpu.json", json.dumps({"gpu": name, "stages": done}, indent=1) + "\n")
    return int(any(outcome["result"] != "passed" for outcome in done))


if __name__ == "__main__":
    sys.exit(main())
