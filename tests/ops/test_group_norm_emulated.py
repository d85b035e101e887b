"""csrc/cuda/group_norm_silu.cu, launcher and kernel, compiled for the CPU with tests/native/cuda_on_cpu: every thread,
barrier and shuffle, forwards and backwards, against float64."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from ctypes import c_bool, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from group_norm_native_cases import CHANNELS, DTYPES, blocks, check, image, random_call
from helpers import assert_same_bits

from fastdiff.ops import native
from fastdiff.ops.group_norm_silu import group_norm_silu, native_impl

ROOT = Path(__file__).resolve().parents[2]
GXX = shutil.which("g++")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(GXX is None, reason="needs g++")]
MARGIN = 64  # elements before and after every result


class Planes(ctypes.Structure):
    _fields_ = [("data", c_void_p)] + [(name, c_int64) for name in ("batch", "channel", "pixel")]


class Channels(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int), ("batch_stride", c_int64)]


class Params(ctypes.Structure):
    _fields_ = (
        [(name, c_int64) for name in ("batch", "channels", "channels2", "pixels", "groups")]
        + [("dtype", c_int), ("x", Planes), ("x2", Planes), ("out", Planes), ("channels_last", c_bool)]
        + [("weight", Channels), ("bias", Channels), ("add", Channels), ("eps", c_double), ("silu", c_bool)]
        + [(name, c_int) for name in ("block_groups", "block_warps", "thread_vecs")]
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("emulation") / "emulate_group_norm.so"
    tests = ROOT / "tests" / "native"
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
    ]
    flags += [f"-I{tests / 'cuda_on_cpu'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([GXX, *flags, str(tests / "emulate_group_norm.cpp"), "-o", str(path)], check=True)
    module = ctypes.CDLL(str(path))
    assert module.size_of_params() == ctypes.sizeof(Params), "Params no longer mirrors csrc/fastdiff.h"
    return module


@pytest.fixture
def emulation(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``backend="native"`` runs the CUDA kernel. ``served`` is whether the last call's block was legal."""
    state = SimpleNamespace(reverse=False, status=0)
    stand_in = SimpleNamespace(GroupNormSiluParams=Params, Planes=Planes, Channels=Channels, cpu_simd=lambda: "avx2")
    monkeypatch.setattr(native, "extension", lambda: stand_in)
    margins = []

    def run(params: Params, threads: int, *addresses: int) -> None:
        for name, address in zip(("x", "x2", "add", "out"), addresses, strict=True):
            getattr(params, name).data = address or None
        state.status = library.emulate_group_norm_silu(ctypes.byref(params), c_bool(state.reverse))

    stand_in.group_norm_silu_cpu_at = run
    make = torch.empty_strided

    def guarded(*args, **options):
        like = make(*args, **options)
        whole = torch.full((like.numel() + 2 * MARGIN,), float("nan"), dtype=like.dtype)
        margins.append(whole)
        return whole.as_strided(like.shape, like.stride(), MARGIN)

    monkeypatch.setattr(torch, "empty_strided", guarded)
    yield state
    assert margins
    for whole in margins:
        assert whole[:MARGIN].isnan().all()
        assert whole[-MARGIN:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_against_float64(emulation, seed, channels, dtype):
    rng = random.Random(f"{seed} {channels} {dtype}")
    pixels = rng.choice([(4, 4), (5, 7), (1, 9), (8, 8), (3, 3)])
    call = random_call(rng, channels, rng.choice([1, 2]), pixels, dtype, "cpu")
    emulation.reverse = rng.random() < 0.5
    forwards = check(**call)
    assert emulation.status == 0
    emulation.reverse = not emulation.reverse
    assert_same_bits(group_norm_silu(**call, backend="native"), forwards)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [(32, 0, 4), (40, 0, 4), (24, 24, 4), (64, 0, 32)])
def test_forced_blocks(emulation, seed, monkeypatch, channels, dtype):
    rng = random.Random(f"{seed} {channels} {dtype}")
    legal = 0
    for block in rng.sample(list(blocks()), 40):
        monkeypatch.setattr(native_impl, "BLOCK", block)
        call = random_call(rng, channels, 1, rng.choice([(4, 4), (3, 7), (9, 5)]), dtype, "cpu")
        emulation.reverse = rng.random() < 0.5
        group_norm_silu(**call, backend="native")
        if emulation.status == 0:
            check(**call)
            legal += 1
    assert legal >= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_groups(emulation, seed, dtype):
    """Eight vectors a thread, and the last warps partly without pixels."""
    for channels, pixels in (((20, 20, 2), (25, 33)), ((64, 0, 8), (32, 32)), ((16, 0, 4), (31, 65))):
        call = random_call(random.Random(seed), channels, 1, pixels, dtype, "cpu")
        if dtype == torch.float32 or channels[0] != 20:  # 20 channels of x are no multiple of 16 bytes
            check(**call)
            assert emulation.status == 0


@pytest.mark.parametrize("add", [False, True])
def test_means_far_above_the_deviation(emulation, seed, add):
    x = image(2, 8, (9, 17), torch.float32, "cpu") + torch.randn(1, 8, 1, 1) * 1000
    if add:
        check(x, None, None, 2, add=-x.mean((0, 2, 3)))
    check(x + 1000, None, None, 4)
    x = image(2, 8, (9, 17), torch.float32, "cpu") + 1000
    check(x, None, None, 2, silu=add)


def test_views(emulation, seed):
    """Slices of channels that keep whole vectors; more channels a pixel in memory than the tensor has."""
    whole = image(2, 96, (5, 6), torch.bfloat16, "cpu")
    check(whole[:, 8:40], None, None, 4, x2=whole[:, 48:80], add=torch.randn(2, 128)[:, 64:])
    assert emulation.status == 0
    check(whole[:, :32, 0, 0], None, None, 4, silu=False)
    assert emulation.status == 0


def test_extremes(emulation):
    """Infinity and NaN stay in their group; a constant group is its bias."""
    for bad in (float("nan"), float("inf")):
        x = image(2, 24, (4, 5), torch.bfloat16, "cpu")
        x[1, 9, 2, 2] = bad
        y = group_norm_silu(x, None, None, 3, backend="native")
        assert y[1, 8:16].isnan().all()
        assert int(y.isnan().sum()) == 8 * 20
    x = torch.full((1, 8, 3, 3), 3.0).contiguous(memory_format=torch.channels_last)
    bias = torch.arange(8.0)
    assert torch.allclose(group_norm_silu(x, None, bias, 2, silu=False, backend="native")[0, :, 0, 0], bias)


def test_refused_calls_do_not_run(emulation):
    x = torch.randn(2, 8, 4, 4)  # contiguous
    group_norm_silu(x, None, None, 2, backend="native")
    assert emulation.status != 0
