"""group_norm_silu by Triton against float64. Run by test_triton.py."""

from __future__ import annotations

import os
import random

import pytest
import torch
from group_norm_terms import assert_right
from torch import Tensor

from fastdiff.ops.group_norm_silu import group_norm_silu, triton_impl

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# channels, channels of x2, groups, height, width: odd, straddling, 10 and 7 a group, one group; many take several tiles
CASES = (
    (5, 0, 5, 3, 3), (20, 16, 3, 5, 7), (7, 5, 4, 1, 9), (320, 0, 32, 8, 8), (100, 124, 32, 4, 4), (48, 53, 1, 13, 11),
    (64, 0, 8, 32, 32), (24, 24, 2, 33, 31), (6, 0, 2, 80, 83), (700, 300, 1, 9, 5), (40, 0, 4, 64, 65),
)  # fmt: skip


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))


def check(x: Tensor, weight, bias, groups: int, **options) -> Tensor:
    got = group_norm_silu(x, weight, bias, groups, **options, backend="triton")
    assert_right(got, x, weight, bias, groups, **options)
    return got


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(seed, case, format):
    rng = random.Random(f"{seed} {case} {format}")
    first, second, groups, *pixels = case
    batch, c = rng.choice([1, 2]), first + second
    dtype = rng.choice(DTYPES)

    def image(channels: int) -> Tensor:
        return torch.randn(batch, channels, *pixels, device=DEVICE).to(dtype).contiguous(memory_format=FORMATS[format])

    def vector(*shape: int) -> Tensor | None:
        kind = rng.choice([None, torch.float32, dtype])
        return None if kind is None else torch.randn(*shape, device=DEVICE).to(kind)

    options = {"x2": image(second) if second else None, "silu": rng.random() < 0.7}
    options["add"] = rng.choice([None, vector(c), vector(1, c), vector(batch, c)])
    got = check(image(first), vector(c), vector(c), groups, **options)
    assert got.is_contiguous(memory_format=FORMATS[format])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_channels(seed, dtype, format):
    whole = torch.randn(2, 30, 6, 7, device=DEVICE).to(dtype).contiguous(memory_format=FORMATS[format])
    check(whole[:, 3:15], None, None, 6, x2=whole[:, 15:21], add=torch.randn(2, 36, device=DEVICE)[:, 18:])
    check(whole[:, ::3], torch.randn(10, 2, device=DEVICE)[:, 0], None, 5)
    check(whole[:, :, 0, 0], None, None, 3, silu=False)
    check(whole[:, :, :, 0], None, None, 3)


@pytest.mark.parametrize("pixels", [(9, 17), (64, 70)])
@pytest.mark.parametrize("format", FORMATS)
def test_means_far_above_the_deviation(seed, format, pixels):
    x = torch.randn(2, 8, *pixels, device=DEVICE) + 1000
    check(x.contiguous(memory_format=FORMATS[format]), None, None, 2)


def test_tiles():
    """One tile where a group fits; tiles within their limit that cover every channel and pixel."""
    for pixels in (1, 16, 63, 64, 1024, 4096, 65536, 1 << 20):
        for groups, size in ((32, 4), (32, 7), (32, 10), (32, 36), (1, 1152), (1, 1 << 17), (5, 1)):
            for last in (True, False):
                t = triton_impl.tiles(pixels, groups, size, 2, last)
                assert t.pixels * t.groups * t.channels <= triton_impl.LARGEST_TILE
                assert t.pixels * t.pixel_tiles >= pixels
                assert t.channels * t.channel_tiles >= size
                assert t.total == 1 or pixels * size > triton_impl.LARGEST_TILE // 4
    assert triton_impl.tiles(1024, 32, 8, 2, True) == (1024, 2, 8, 1, 1)
