"""The Triton kernels compile for every chip without spills, contraction or flushing (see triton_aot.py)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_aot.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.fixture(scope="module")
def compiled():
    """One variant a kernel and chip. In a process of its own: it replaces Triton's driver, and needs real kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", ["randn", "add_noise", "update", "attention", "group_norm_silu", "conv_epilogue"])
def test_compiles(compiled, chip, kernel):
    variants = [f for f in compiled if f["chip"] == chip and f["variant"].split()[0] == kernel]
    assert variants
    for found in variants:
        print(found)
        assert found["problems"] == []
        # No contiguous kernel is compiled to scalar accesses.
        assert found["vector"] or "contiguous" not in found["variant"]
