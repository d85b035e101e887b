"""What the tests share: processes and threads, the run's seed, hypothesis' profiles, the CPU's SIMD variants."""

import os
import random
import signal
from collections.abc import Iterator

import pytest

# OpenMP reads these once, as torch is imported. Threads that spin while they wait take the cores from the other
# processes that test; and as many threads as cores in each of several processes are too many.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch
from helpers import SEED, SEED_VARIABLE, SIMD, use_simd

# A shell that starts a run in the background lets it ignore SIGINT, which some tests send themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ[SEED_VARIABLE] = str(SEED)  # the processes that this one starts must collect the same random cases

try:
    from hypothesis import settings
except ImportError:  # only the tests that need it skip
    pass
else:
    settings.register_profile("local", deadline=None, print_blob=True)
    settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """``pytest`` alone runs in two processes, where pytest-xdist is installed; -n, or files named, say otherwise.

    This is no addopts, since benchmarks measure nothing in pytest-xdist's processes.
    """
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if whole and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = 2
        config.option.dist = "worksteal"


def pytest_report_header() -> str:
    return f"{SEED_VARIABLE}={SEED} (set it to repeat this run's random cases)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def seed() -> int:
    """The run's seed; torch's and Python's generators start from it."""
    print(f"{SEED_VARIABLE}={SEED}")  # pytest shows it where a test fails
    torch.manual_seed(SEED)
    random.seed(SEED)
    return SEED


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture(params=SIMD)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native backend's kernels, compiled for each instruction set that this CPU has."""
    yield from use_simd(request.param)


@pytest.fixture(params=("reference", *SIMD))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU's backends: the reference, and native with each instruction set."""
    if request.param == "reference":
        yield "reference"
    else:
        for _ in use_simd(request.param):
            yield "native"
