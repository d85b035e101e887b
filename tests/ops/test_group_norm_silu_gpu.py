"""csrc/cuda/group_norm_silu.cu on a GPU against float64; which calls it takes, and that others go to Triton."""

from __future__ import annotations

import random

import pytest
import torch
from group_norm_native_cases import CHANNELS, DTYPES, blocks, check, image, random_call
from helpers import assert_same_bits

from fastdiff.ops.group_norm_silu import group_norm_silu, native_impl

pytestmark = pytest.mark.gpu
PIXELS = ((4, 4), (8, 8), (5, 7), (1, 9), (16, 16), (13, 17), (32, 32))


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that an element that is not written shows."""
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_against_float64(seed, channels, dtype):
    rng = random.Random(f"{seed} {channels} {dtype}")
    size = sum(channels[:2]) // channels[2]
    for pixels in rng.sample(PIXELS, 4):
        if size * pixels[0] * pixels[1] * dtype.itemsize <= 40960:  # what a block holds, whatever its shape
            call = random_call(rng, channels, rng.choice([1, 3]), pixels, dtype, "cuda")
            assert_same_bits(check(**call), group_norm_silu(**call, backend="native"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [(256, 0, 32), (64, 64, 32), (40, 0, 4), (24, 24, 4)])
def test_forced_blocks(seed, monkeypatch, channels, dtype):
    rng = random.Random(f"{seed} {channels} {dtype}")
    call = random_call(rng, channels, 2, rng.choice([(8, 8), (15, 17)]), dtype, "cuda")
    legal = 0
    for block in blocks():
        monkeypatch.setattr(native_impl, "BLOCK", block)
        try:
            check(**call)
            legal += 1
        except RuntimeError as error:
            if "cannot serve" not in str(error):
                raise
    assert legal >= 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(seed, dtype):
    """Slices of channels_last tensors that keep vectors whole; those that break them go to Triton."""
    whole = image(2, 96, (6, 7), dtype, "cuda")
    check(whole[:, 8:40], None, None, 4, x2=whole[:, 48:80], add=torch.randn(2, 128, device="cuda")[:, 64:])
    check(whole[:, :32, 0, 0], None, None, 4, silu=False)
    check(whole[:, 16:48, 1:5, :], None, None, 2)
    part, odd = whole[:, 1:33], image(2, 36, (6, 7), dtype, "cuda")[:, :34]
    for x, groups in ((part, 4), (odd, 2), (whole.contiguous(), 4)):
        with pytest.raises(RuntimeError, match="cannot serve"):
            group_norm_silu(x, None, None, groups, backend="native")
        check(x, None, None, groups, backend="auto")


def test_means_far_above_the_deviation(seed):
    x = image(2, 64, (16, 16), torch.float32, "cuda") + 1000
    check(x, None, None, 8)
    shift = torch.randn(1, 64, 1, 1, device="cuda") * 1000
    check(x + shift, None, None, 8, add=-shift.flatten())
    x[:, :, 0] += 1000
    check(x, None, None, 8, silu=False)
    y = image(2, 64, (16, 16), torch.float16, "cuda")
    y[:, :, :2] += 1000
    check(y, None, None, 8)


@pytest.mark.parametrize("batch", [65536, 70001])
def test_large_batches(seed, batch):
    check(image(batch, 16, (2, 2), torch.bfloat16, "cuda"), None, None, 2, add=torch.randn(batch, 16, device="cuda"))


def test_bad_numbers_stay_in_their_group(seed):
    for bad in (float("nan"), float("inf")):
        for dtype in DTYPES:
            x = image(2, 24, (4, 5), dtype, "cuda")
            x[1, 9, 2, 2] = bad
            y = group_norm_silu(x, None, None, 3, backend="native")
            assert y[1, 8:16].isnan().all()
            assert int(y.isnan().sum()) == 8 * 20


def test_in_a_graph(seed):
    x, weight, bias = image(4, 256, (16, 16), torch.bfloat16, "cuda"), *torch.randn(2, 256, device="cuda")
    group_norm_silu(x, weight, bias, 32)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group_norm_silu(x, weight, bias, 32)
    x.copy_(image(4, 256, (16, 16), torch.bfloat16, "cuda"))
    graph.replay()
    assert_same_bits(y, group_norm_silu(x, weight, bias, 32, backend="native"))
