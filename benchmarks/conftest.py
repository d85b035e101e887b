"""How things are timed here.

A benchmark hands ``contest`` its contestants, fastdiff first. They take turns: each round runs all of them once, so
that whatever else the machine does hits all alike. pytest-benchmark times fastdiff's turns (its ``pedantic`` mode); the
setup that it runs before each of them times the others. Medians, minima, quartiles and ratios of every contestant go to
``extra_info``, in seconds, beside the bytes that must move and the machine's copy bandwidth. What a benchmark compares
is checked for equality before anything is timed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import GPU

import fastdiff
from fastdiff.ops import native

SECONDS = 0.5 if GPU else 2.5  # for all rounds of one contest
ROUNDS = (3, 200)  # at least, at most
GPU_CALLS = 20  # a turn on a GPU is so many calls and one synchronisation
SIZES = [(64, 3, 32, 32), (64, 3, 256, 256) if GPU else (16, 3, 256, 256)]
LIMIT = "FASTDIFF_BENCH_SECONDS"  # no benchmark starts later than so many seconds after the first

Contestant = Callable[[], Any]
_start = time.monotonic()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == "bench_samplers.py")  # which changes the process's allocator


def pytest_sessionstart() -> None:
    global _start
    _start = time.monotonic()


def pytest_runtest_setup() -> None:
    """Skip what is left once the time is over: pytest-benchmark writes its file after the last benchmark."""
    limit = float(os.environ.get(LIMIT) or "inf")
    if time.monotonic() - _start > limit:
        pytest.skip(f"no time is left: {LIMIT}={limit:g}")


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """Without pytest-benchmark's own look at the CPU, which can take longer than a stage on a GPU has left."""
    return {"system": platform.system(), "machine": platform.machine(), "python_version": platform.python_version()}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    diffusers = importlib.util.find_spec("diffusers") and importlib.import_module("diffusers").__version__
    machine_info["fastdiff"] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "waiting": os.environ.get("OMP_WAIT_POLICY", ""),  # how OpenMP's threads do, which tells in small calls
        "torch": torch.__version__,
        "diffusers": diffusers,
        "fastdiff": fastdiff.__version__,
        "simd": _simd(),
        "bfloat16": native.bfloat16(),
        "load": os.getloadavg(),
    }


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def diffusers() -> Any:
    """The package, or None where it is not installed: its rows are then marked absent."""
    return importlib.import_module("diffusers") if importlib.util.find_spec("diffusers") else None


@pytest.fixture(scope="session")
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of torch's own copy between two tensors of 512 MiB."""
    source = torch.ones(128 << 20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _typical(lambda: target.copy_(source), device)


@pytest.fixture(scope="session")
def convolutions(device: torch.device) -> dict[str, float]:
    """Operations a second of the library's own 3×3 convolution of 256 channels, channels_last: a network's ceiling."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        batch = 8 if device.type == "cpu" else 256
        x, w = torch.ones(batch, 256, 16, 16, device=device), torch.ones(256, 256, 3, 3, device=device)
        x, w = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, w))

        def convolve(x: torch.Tensor = x, w: torch.Tensor = w) -> torch.Tensor:
            return torch.conv2d(x, w, padding=1)

        flops = 2 * 9 * x.numel() * w.shape[0]
        rates[str(dtype).removeprefix("torch.")] = flops / _typical(convolve, device)
    return rates


@pytest.fixture
def contest(
    benchmark: Any, device: torch.device, copy_bandwidth: float, convolutions: dict[str, float]
) -> Callable[..., None]:
    """Run and record one contest.

    contestants: name -> what to call, "fastdiff" first; None marks one that is absent.
    moved: bytes that must cross the memory bus in one call; 0 where that says nothing.
    flops: operations of a call, those of the textbook; 0 where that says nothing.
    targets: dicts of kind ("ratio", "of_copy", "images" or "beyond"), contestant, goal and, optionally, stretch, and
        ours, the name of fastdiff's contestant where it is not "fastdiff". "of_copy" is fastdiff's share of the
        machine's copy bandwidth or, where the contestant is a copy, of that one's.
    steps: how many steps of a loop one call makes; times are then given for one of them. A call that is no loop is
        made once untimed before it is timed, so that each meets the caches and threads as its own last call left them;
        ``warm`` decides otherwise.
    calls: on a GPU, how many calls a turn makes before it waits, where it is no loop.
    repeats: how many times a contestant does its work when it is called; times are given for once.
    timesteps: how many such steps a sampling takes, where images a second are to be shown.
    rounds: how many rounds, of calls that were made already; None is as many as ``seconds`` has room for.
    memory: bytes that each contestant takes at most, where that was looked at.
    """

    def run(
        op: str,
        case: str,
        contestants: dict[str, Contestant | None],
        *,
        shape: tuple[int, ...] = (),
        moved: int = 0,
        flops: int = 0,
        targets: list[dict[str, Any]] | None = None,
        steps: int = 1,
        seconds: float = SECONDS,
        warm: bool | None = None,
        calls: int = GPU_CALLS,
        repeats: int = 1,
        timesteps: int = 0,
        rounds: int | None = None,
        memory: dict[str, int | None] | None = None,
    ) -> None:
        calls = calls if device.type == "cuda" and steps == 1 else 1
        turns = {name: _turn(call, calls, device) for name, call in contestants.items() if call is not None}
        warm = steps == 1 if warm is None else warm
        times: dict[str, list[float]] = {name: [] for name in turns}
        rounds = _rounds(turns, seconds, warm) if rounds is None else rounds
        ours, *others = turns
        started = _busy()

        def rivals() -> None:
            for name in others:
                if warm:
                    turns[name]()
                times[name].append(_time(turns[name]))
            if warm:
                turns[ours]()

        benchmark.pedantic(turns[ours], setup=rivals, rounds=rounds, iterations=1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        times[ours] = list(benchmark.stats.stats.data)
        benchmark.group = op
        each = calls * steps * repeats
        benchmark.extra_info.update(
            op=op, case=case, shape=list(shape), rounds=rounds, calls=calls * repeats, steps=steps, bytes=moved,
            flops=flops, timesteps=timesteps, memory=memory or {},
            copy_bandwidth=copy_bandwidth, targets=targets or [], elsewhere=_elsewhere(started),
            ceiling=convolutions if flops else None,
            load=os.getloadavg()[0], absent=[name for name, call in contestants.items() if call is None],
            contestants={
                name: _record([t / each for t in values], [t / each for t in times[ours]], moved)
                for name, values in times.items()
            },
        )  # fmt: skip

    return run


def _turn(call: Contestant, calls: int, device: torch.device) -> Contestant:
    if device.type == "cpu":
        return call

    def turn() -> None:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()

    return turn


def _rounds(turns: dict[str, Contestant], seconds: float, warm: bool) -> int:
    """Warm up, and see how many rounds fit."""
    if warm:
        for turn in turns.values():
            turn()
    cost = sum(_time(turn) for turn in turns.values()) * (2 if warm else 1)
    return max(ROUNDS[0], min(ROUNDS[1], int(seconds / cost)))


def _time(call: Contestant) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _record(times: list[float], ours: list[float], moved: int) -> dict[str, float]:
    low, _, high = statistics.quantiles(times, n=4)
    ratio_low, _, ratio_high = statistics.quantiles([a / b for a, b in zip(times, ours, strict=True)], n=4)
    median = statistics.median(times)
    return {
        "median": median, "min": min(times), "q1": low, "q3": high, "ratio": median / statistics.median(ours),
        "ratio_q1": ratio_low, "ratio_q3": ratio_high, "bandwidth": moved / median,
    }  # fmt: skip


def _typical(call: Contestant, device: torch.device) -> float:
    """The median time of a call."""
    calls = GPU_CALLS if device.type == "cuda" else 1
    turn = _turn(call, calls, device)
    turn()
    return statistics.median(_time(turn) for _ in range(9)) / calls


# ---- the machine


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _simd() -> str:
    module = native.extension()
    return "not built" if isinstance(module, str) else module.cpu_simd()


def _busy() -> tuple[float, float, float] | None:
    """(wall time, the machine's busy CPU seconds, ours), or None where /proc does not say."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    ticks = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), ticks, sum(os.times()[:4])  # ours, and our children's


def _elsewhere(started: tuple[float, float, float] | None) -> float | None:
    """The share of the machine's CPU time since then that went to other processes: 0 is a quiet machine."""
    now = _busy()
    if started is None or now is None:
        return None
    wall, busy, mine = (b - a for a, b in zip(started, now, strict=True))
    return max(0.0, (busy - mine) / (wall * (os.cpu_count() or 1)))
