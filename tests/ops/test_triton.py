"""Runs the cases of triton_*_cases.py and triton_cases.py in a process where the kernels are what the cases need.

Triton decides when a kernel is decorated whether it is interpreted, and for its own library when it is imported, so
TRITON_INTERPRET=1 must be set before anything imports triton, and must not stay set for the tests that use a GPU.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


# In two halves, which take about as long and run side by side.
HALVES = (
    ("triton_cases", "triton_update_cases", "triton_conv_epilogue_cases"),
    ("triton_attention_cases", "triton_group_norm_cases", "triton_conv_cases", "triton_fast_cases"),
)

QUICK = " or ".join((
    "test_randn_of_any_length", "(test_add_noise and drawn)", "test_noise_given", "test_through_the_operation",
    "(test_keys and 16)", "test_slices_of_channels", "test_counters_are_zeros",
))  # fmt: skip


def run_cases(*options: str, **environment: str) -> None:
    with ThreadPoolExecutor(len(HALVES)) as pool:
        for half in [pool.submit(run_files, names, options, environment) for names in HALVES]:
            half.result()


def run_files(names: tuple[str, ...], options: tuple[str, ...], environment: dict[str, str]) -> None:
    cases = [Path(__file__).with_name(f"{name}.py") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning",
         *options, *cases],
        capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_some_in_the_interpreter(seed):
    """The smallest cases of each kernel, which take seconds; the next test has them all."""
    names = tuple(name for half in HALVES for name in half if name != "triton_fast_cases")
    run_files(names, ("-k", QUICK), {"FASTDIFF_TEST_SEED": str(seed), "TRITON_INTERPRET": "1"})


@pytest.mark.slow
def test_in_the_interpreter(seed):
    run_cases(FASTDIFF_TEST_SEED=str(seed), TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_the_gpu(seed):
    """In eight processes a half where pytest-xdist is installed: compiling the kernels takes most of the time."""
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    run_cases(*parallel, FASTDIFF_TEST_SEED=str(seed))
