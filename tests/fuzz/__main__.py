"""The driver: calls in a process of its own, watched for its death and for calls that do not end."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

PATIENCE = 120  # seconds for one call


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=sys.modules["fuzz"].__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--kind", default="", help="only of this kind: " + ", ".join(KINDS))
    parser.add_argument("--call", type=int, help="make this one alone, in this process")
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)  # where the child writes which call it makes
    options = parser.parse_args()
    if options.call is not None:
        from fuzz.calls import make

        print(make(options.seed, options.call, options.kind).text, flush=True)
        report = one(options.seed, options.call, options.kind)
        print(report or "right")
        return bool(report)
    if options.at is not None:
        return work(options)
    print(f"fuzz: seed {options.seed}, {options.calls} calls", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / "at"
        child = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "fuzz", "--seed", str(options.seed), "--kind", options.kind,
             "--calls", str(options.calls), "--at", str(at)]
        )  # fmt: skip
        seen, since = "", time.monotonic()
        while child.poll() is None:
            time.sleep(0.2)
            now = at.read_text() if at.exists() else ""
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                child.kill()
                child.wait()
                print(f"call {seen} did not end within {PATIENCE} s\n  {repeat(options.seed, seen, options.kind)}")
                return 1
        if child.returncode < 0:
            seen = at.read_text()
            print(f"call {seen} ended the process: signal {-child.returncode}")
            print(f"  {repeat(options.seed, seen, options.kind)}")
        return 1 if child.returncode else 0


def work(options: argparse.Namespace) -> int:
    """The child: every call, and the count of its failures."""
    found: Counter[str] = Counter()
    handle = os.open(options.at, os.O_CREAT | os.O_WRONLY)
    for number in range(options.calls):
        os.pwrite(handle, f"{number:<12}".encode(), 0)
        report = one(options.seed, number, options.kind)
        if report:
            found[report.split("\n")[0].split("(")[0]] += 1
            print(f"\n{report}", flush=True)
    print(f"fuzz: {options.calls} calls, {sum(found.values())} failures", *map(str, found.items()))
    return 1 if found else 0


def one(seed: int, number: int, kind: str = "") -> str:
    """Make one call; what is wrong with it and how to repeat it, or nothing."""
    from fuzz.calls import make
    from fuzz.draws import Wrong, attempt

    call = make(seed, number, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attempt(call)
        except Wrong as error:
            return f"{call.text}\n  {error}\n  {repeat(seed, number, kind)}"
    return ""


def repeat(seed: int, number: int | str, kind: str = "") -> str:
    kinds = f" --kind {kind}" if kind else ""
    return f"repeat: (cd tests && python -m fuzz --seed {seed}{kinds} --call {str(number).strip()})"


KINDS = ("randn", "add_noise", "update", "conv_epilogue", "group_norm_silu", "attention", "conv2d", "sampler", "rows",
         "from_json", "sample")  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
