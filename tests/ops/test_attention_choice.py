"""Which backend serves attention: the measured tables, the environment's variable, and names that are none."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from fastdiff.ops import triton_support
from fastdiff.ops.attention import attention, backends, choice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_choice(monkeypatch):
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type: None)
    monkeypatch.setattr(backends, "_chip", lambda: "unknown")
    assert choice("cpu", torch.float32, 512)[0] == "torch"
    for dtype, D in itertools.product(DTYPES, range(1, 513)):
        name, why = choice("cuda", dtype, D)
        assert name == ("torch" if D <= 128 or dtype == torch.float32 else "triton")
        assert "not a measurement" in why
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type: "triton is not installed")
    assert choice("cuda", torch.float16, 512) == ("torch", "triton is not installed")


def test_tiles():
    """All of a head's channels are multiplied: at once, or ``depth`` at a time, whatever a program's columns are."""
    tables = json.loads(Path(backends.__file__).with_name("tiles.json").read_text())
    for chip in tables.keys() - {"about", "columns"}:
        for sizes in tables[chip].values():
            for name, tiles in sizes.items():
                _, block_n, depth, columns, *_ = tiles
                assert depth > 0 or columns == 0, f"{chip} {name}"
                assert block_n > 0 or (name.endswith(" short") and depth and columns), f"{chip} {name}"


def test_an_entry_of_a_chip(monkeypatch):
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type: None)
    entry = {"source": "tested", "16-bit": [[64, 80, "triton"], [512, 0, "torch"]], "32-bit": [[512, 0, "torch"]]}
    monkeypatch.setattr(backends, "_table", lambda: {"sm_42": entry})
    monkeypatch.setattr(backends, "_chip", lambda: "sm_42")
    backends.tabulated.cache_clear()
    assert choice("cuda", torch.float16, 64, 80) == ("triton", "heads of up to 64 channels, up to 80 keys; tested")
    assert choice("cuda", torch.float16, 64, 81) == ("torch", "heads of up to 512 channels; tested")
    assert choice("cuda", torch.bfloat16, 65, 1)[0] == "torch"
    assert choice("cuda", torch.float32, 64)[0] == "torch"
    backends.tabulated.cache_clear()


@pytest.mark.parametrize("name", ["", "auto", "native", "torch", "reference", "triton"])
def test_the_variable(seed, monkeypatch, name):
    monkeypatch.setenv("FASTDIFF_BACKEND", name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (40, 30, 30))
    expected = name if name in ("reference", "triton") else "torch"
    chosen, why = choice("cpu", torch.float32, 8)
    assert chosen == expected
    assert ("FASTDIFF_BACKEND" in why) == (name in backends.BACKENDS)
    if name == "triton":
        with pytest.raises(RuntimeError, match=r"FASTDIFF_BACKEND.*TRITON_INTERPRET"):
            attention(q, k, v)
    else:
        assert attention(q, k, v).equal(attention(q, k, v, backend=expected))


def test_an_unknown_name(seed, monkeypatch):
    q, k, v = torch.randn(3, 1, 1, 2, 4)
    with pytest.raises(ValueError, match="backend is 'fastest'; it must be auto"):
        attention(q, k, v, backend="fastest")
    with pytest.raises(ValueError, match="no native kernel"):
        attention(q, k, v, backend="native")
    monkeypatch.setenv("FASTDIFF_BACKEND", "fastest")
    with pytest.raises(ValueError, match="FASTDIFF_BACKEND is 'fastest'"):
        attention(q, k, v)
