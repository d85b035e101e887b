"""Which backend serves attention: the measured tables, the environment's variable, and names that are none."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from fastdiff.ops import backend, triton_support
from fastdiff.ops.attention import KERNELS, attention, triton_impl
from fastdiff.ops.backend import Entry, Rule, select

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA = torch.device("cuda", 0)


def chosen(dtype: torch.dtype, head: int, keys: int = 1024, device: torch.device = CUDA, matrix: bool = False) -> str:
    facts = {"bits": 8 * dtype.itemsize, "head": head, "keys": keys, "matrix": matrix}
    return select("attention", "auto", device, facts, KERNELS)


def test_the_choice(monkeypatch):
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type: None)
    monkeypatch.setattr(backend, "chip_of", lambda device: "unknown")
    assert chosen(torch.float32, 512, device=torch.device("cpu")) == "torch"
    for dtype, D in itertools.product(DTYPES, range(1, 513)):
        assert chosen(dtype, D) == ("torch" if D <= 128 or dtype == torch.float32 else "triton")
    assert "not a measurement" in backend.entry_for("attention", CUDA).source
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type: "triton is not installed")
    assert chosen(torch.float16, 512) == "torch"


def test_the_h100(monkeypatch):
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type: None)
    monkeypatch.setattr(backend, "chip_of", lambda device: "sm_90")
    for dtype, D, keys in itertools.product(DTYPES, range(1, 513), (1, 77, 128, 129, 1024)):
        ours = dtype != torch.float32 and (D <= 16 or (D <= 48 and keys <= 128) or D > 128)
        assert chosen(dtype, D, keys) == ("triton" if ours else "torch")


@pytest.mark.parametrize("chip", ["avx512", "avx2", "portable"])
def test_the_cpu(monkeypatch, chip):
    monkeypatch.setattr(backend, "chip_of", lambda device: chip)
    monkeypatch.setattr(backend, "why_missing", lambda *what: None)
    for dtype, D, keys, matrix in itertools.product(DTYPES, range(1, 513), (16, 48, 77, 80, 1024), (False, True)):
        few = (D <= 32 and keys <= 80) or (D <= 40 and keys <= 48) or (D <= 80 and keys == 77)
        narrow = {"avx512": not matrix or D <= 20 or few, "avx2": dtype != torch.float32 or D <= 80, "portable": False}
        expected = "native" if narrow[chip] else "torch"
        assert chosen(dtype, D, keys, torch.device("cpu"), matrix) == expected


def test_tiles():
    """All of a head's channels are multiplied: at once, or ``depth`` at a time, whatever a program's columns are."""
    tables = json.loads(Path(triton_impl.__file__).with_name("tiles.json").read_text())
    for chip in tables.keys() - {"about", "columns"}:
        for sizes in tables[chip].values():
            for name, tiles in sizes.items():
                _, block_n, depth, columns, *_ = tiles
                assert depth > 0 or columns == 0, f"{chip} {name}"
                assert block_n > 0 or (name.endswith(" short") and depth and columns), f"{chip} {name}"


def test_an_entry_of_a_chip(monkeypatch):
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type: None)
    rules = (Rule("triton", {"bits": (16, 16), "head": (0, 64), "keys": (0, 80)}), Rule("torch", {}))
    monkeypatch.setattr(backend, "table", lambda op: {"sm_42": Entry(rules, "tested")})
    monkeypatch.setattr(backend, "chip_of", lambda device: "sm_42")
    assert chosen(torch.float16, 64, 80) == "triton"
    assert chosen(torch.float16, 64, 81) == "torch"
    assert chosen(torch.bfloat16, 65, 1) == "torch"
    assert chosen(torch.float32, 64) == "torch"
    assert [str(rule) for rule in rules] == ["triton where bits = 16, head ≤ 64, keys ≤ 80", "torch"]


@pytest.mark.parametrize("name", ["", "auto", "native", "torch", "reference", "triton"])
def test_the_variable(seed, monkeypatch, name):
    monkeypatch.setenv("FASTDIFF_BACKEND", name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (40, 30, 30))
    monkeypatch.setattr(backend, "chip_of", lambda device: "unknown")  # whose table prefers torch's
    expected = "torch" if name in ("", "auto") else name
    if name == "triton":
        with pytest.raises(RuntimeError, match=r"FASTDIFF_BACKEND.*TRITON_INTERPRET"):
            attention(q, k, v)
    else:
        assert attention(q, k, v).equal(attention(q, k, v, backend=expected))


def test_a_name_that_cannot_serve(seed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = torch.randn(3, 1, 1, 2, 4)
    with pytest.raises(ValueError, match="backend is 'fastest'; it must be auto"):
        attention(q, k, v, backend="fastest")
    with pytest.raises(RuntimeError, match="cannot serve"):  # interpreted on a CPU, and only if that is asked for
        attention(q, k, v, backend="triton")
    monkeypatch.setenv("FASTDIFF_BACKEND", "fastest")
    with pytest.raises(ValueError, match="FASTDIFF_BACKEND is 'fastest'"):
        attention(q, k, v)
