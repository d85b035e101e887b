"""conv2d by Triton against float64. Run by test_triton.py."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import assert_accurate
from triton_cases import DEVICE, NAN

from fastdiff.ops.conv2d import bind, conv2d
from fastdiff.ops.conv2d import gemm_triton as triton_impl
from fastdiff.ops.conv2d.gemm import pack
from fastdiff.ops.conv2d.geometry import Geometry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# side, stride, zeros on two sides, upsample, channels of x and of the pointwise inputs, batch, height, width
KINDS = {
    "3x3": (3, 1, (1, 1), False, (64,), 2, 7, 9),
    "two steps a tap": (3, 1, (1, 1), False, (128,), 1, 4, 4),
    "shortcut": (3, 1, (1, 1), False, (64, 64), 1, 5, 6),
    "shortcut and skip": (3, 1, (1, 1), False, (128, 64, 192), 1, 4, 5),
    "1x1": (1, 1, (0, 0), False, (128,), 3, 5, 3),
    "down": (3, 2, (0, 1), False, (64,), 1, 8, 10),
    "down, symmetric": (3, 2, (1, 1), False, (64,), 1, 9, 7),
    "up": (3, 1, (1, 1), True, (64,), 2, 3, 5),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: make(*a, **k).fill_(NAN))


def images(batch, channels, height, width, dtype):
    made = (torch.randn(batch, c, height, width, device=DEVICE).to(dtype) for c in channels)
    return [t.contiguous(memory_format=torch.channels_last) for t in made]


def check(rng, kind, dtype, N=None, split=None, monkeypatch=None):
    side, stride, padding, upsample, channels, batch, height, width = KINDS[kind]
    N = N or rng.choice([16, 40, 64, 100])
    (x,) = images(batch, channels[:1], height, width, dtype)
    weight = torch.randn(N, channels[0], side, side, device=DEVICE).to(dtype) / side
    points = [torch.randn(N, c, 1, 1, device=DEVICE).to(dtype) for c in channels[1:]]
    options = {"stride": stride, "padding": (padding, padding), "upsample": upsample}
    shape = conv2d(x, weight, **options).shape
    inputs = images(batch, channels[1:], *shape[2:], dtype)
    residual = rng.choice([None, images(batch, [N], *shape[2:], dtype)[0]])
    bias = rng.choice([None, torch.randn(N, device=DEVICE), torch.randn(N, device=DEVICE).to(dtype)])
    if split is not None:
        choose = triton_impl.tiles_for
        monkeypatch.setattr(triton_impl, "tiles_for", lambda *a: choose(*a)._replace(split=split))
    sums = {"inputs": inputs, "pointwise": points, "residual": residual}
    got = bind(x, weight, bias, **options, **sums, backend="triton")(x, residual, inputs)
    assert got.is_contiguous(memory_format=torch.channels_last)

    def every(change):
        def to(t):
            return None if t is None else change(t)

        return conv2d(to(x), to(weight), to(bias), **options, inputs=[to(t) for t in inputs], backend="torch",
                      exact=True, pointwise=[to(w) for w in points], residual=to(residual))  # fmt: skip

    exact, size = every(lambda t: t.double()), every(lambda t: t.double().abs())
    theirs = every(lambda t: t.to(dtype))
    if upsample:  # summed weights are rounded once more
        theirs = theirs + size * torch.finfo(dtype).eps
    if dtype == torch.float32:  # whose sums of K terms, too, are rounded
        size = size * 4
    assert_accurate(got, exact, theirs, size)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(seed, kind, dtype):
    check(random.Random(f"{seed} {kind}"), kind, dtype)


@pytest.mark.parametrize("split", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["3x3", "shortcut and skip", "up"])
def test_shared_tiles(seed, kind, split, monkeypatch):
    check(random.Random(f"{seed} {kind}"), kind, torch.float16, split=split, monkeypatch=monkeypatch)


def test_views(seed):
    """An offset that breaks 16-byte vectors, and strides that are not channels_last."""
    x = torch.randn(2, 64, 5, 6, device=DEVICE).half()
    weight = torch.randn(40, 64, 3, 3, device=DEVICE).half()

    def computed(x):
        return conv2d(x, weight, padding=1, backend="triton")

    expected = computed(x.contiguous(memory_format=torch.channels_last))
    memory = torch.full((x.numel() + 3,), NAN, device=DEVICE).half()[3:]
    offset = memory.view(2, 5, 6, 64).permute(0, 3, 1, 2).copy_(x)
    sliced = torch.full((2, 64, 6, 9), NAN, device=DEVICE).half()[:, :, 1:, 2:8].copy_(x)
    for view in (offset, sliced, x.contiguous()):
        assert torch.equal(computed(view), expected)


def test_counters_are_zeros_again(seed):
    (x,) = images(1, [128], 4, 4, torch.float16)
    geometry = Geometry(padding=((1, 1), (1, 1)))
    weights = pack(torch.randn(64, 128, 3, 3, device=DEVICE), (), geometry, torch.float16)
    counters = torch.zeros(16, dtype=torch.int32, device=DEVICE)

    def computed():
        out = torch.empty(1, 64, 4, 4, dtype=torch.float16, device=DEVICE, memory_format=torch.channels_last)
        triton_impl.conv(out, x, (), weights, None, None, 3, 1, 1, False, counters)
        return out

    first = computed()
    assert not counters.any()
    for _ in range(3):
        assert torch.equal(computed(), first)
    assert not counters.any()
