"""randn and add_noise by Triton against the reference, to the bit. Run by test_triton.py."""

from __future__ import annotations

import math
import os
import random

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.noise import NoiseKey
from fastdiff.ops.add_noise import reference as add_noise_reference
from fastdiff.ops.add_noise.triton_impl import add_noise
from fastdiff.ops.randn import reference as randn_reference
from fastdiff.ops.randn.triton_impl import randn
from fastdiff.ops.triton_support import why_missing

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


def seeded(seed: int, *case: object) -> random.Random:
    """A generator for one case of a run with that seed."""
    return random.Random(f"{seed} {case}")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, or NaN in both."""
    word = {4: torch.int32, 2: torch.int16}[a.element_size()]
    a, b = a.contiguous(), b.contiguous()
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return bool(((a.view(word) == b.view(word)) | (a.isnan() & b.isnan())).all())


def key_of(rng: random.Random, batch: int) -> NoiseKey:
    if rng.random() < 0.5:
        return NoiseKey(rng.choice([0, 1, 16, 1 << 63, (1 << 64) - 1, rng.getrandbits(64)]), rng.getrandbits(31))
    seeds = torch.tensor([rng.getrandbits(64) - (1 << 63) for _ in range(batch)], device=DEVICE)
    return NoiseKey(seeds=seeds, samples=torch.tensor([rng.getrandbits(32) for _ in range(batch)], device=DEVICE))


def drawn(shape: tuple[int, ...], key: NoiseKey, draw: int, stream: int) -> Tensor:
    return randn_reference.randn(shape, *key.lists(shape[0]), draw, stream, DEVICE)


def poisoned(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A view of four dimensions and the NaN-filled memory that it lies in."""
    b, c, h, w = shape
    if kind == "contiguous":
        memory = torch.full(shape, NAN, dtype=dtype, device=DEVICE)
        return memory, memory
    if kind == "channels_last":
        memory = torch.full((b, h, w, c), NAN, dtype=dtype, device=DEVICE)
        return memory.permute(0, 3, 1, 2), memory
    if kind == "channels":  # a slice of the channels, at an odd offset
        memory = torch.full((b, c + 3, h, w), NAN, dtype=dtype, device=DEVICE)
        return memory[:, 1 : c + 1], memory
    if kind == "channels_last_channels":
        memory = torch.full((b, h, w, 2 * c), NAN, dtype=dtype, device=DEVICE)
        return memory.permute(0, 3, 1, 2)[:, c:], memory
    if kind == "samples":
        memory = torch.full((2 * b + 1, c, h, w), NAN, dtype=dtype, device=DEVICE)
        return memory[1::2], memory
    memory = torch.full((b, c, h, 2 * w), NAN, dtype=dtype, device=DEVICE)
    return memory[..., ::2], memory


KINDS = ("contiguous", "channels_last", "channels", "channels_last_channels", "samples", "columns")
SHAPES = ((2, 3, 8, 8), (3, 3, 5, 7), (1, 1, 1, 1), (2, 1, 1, 3), (2, 4, 16, 16), (4, 2, 1, 65))


def filled(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = poisoned(kind, shape, dtype)[0]
    return tensor.copy_(torch.randn(shape))


def outside_is_untouched(view: Tensor, memory: Tensor) -> bool:
    return int(memory.isnan().sum()) == memory.numel() - view.numel()


# ---- randn


@pytest.mark.parametrize("key_seed", [0, 42, 1 << 63, (1 << 64) - 1, None])
def test_a_million_normals(seed, key_seed):
    rng = seeded(seed, key_seed)
    shape, draw, stream = (3, 350_003), rng.getrandbits(32), rng.getrandbits(32)
    key = NoiseKey(rng.getrandbits(64) if key_seed is None else key_seed, rng.getrandbits(31))
    print(key, draw, stream)
    out = torch.full(shape, NAN, device=DEVICE)
    randn(out, key, draw, stream)
    assert same(out, drawn(shape, key, draw, stream))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 127, 128, 129, 1023, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
def test_randn_of_any_length(seed, n, dtype):
    rng = seeded(seed, n, dtype)
    key = key_of(rng, 3)
    memory = torch.full((3, n + 1), NAN, dtype=dtype, device=DEVICE)
    randn(memory[:, :n], key, 7, 1)
    assert same(memory[:, :n], drawn((3, n), key, 7, 1).to(dtype))
    assert memory[:, n:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_randn_into_views(seed, kind, dtype):
    rng = seeded(seed, kind, dtype)
    for shape in SHAPES:
        key = key_of(rng, shape[0])
        out, memory = poisoned(kind, shape, dtype)
        randn(out, key, 0, 5)
        assert same(out, drawn(shape, key, 0, 5).to(dtype))
        assert outside_is_untouched(out, memory)


def test_an_empty_batch():
    randn(torch.empty(0, 3, device=DEVICE), NoiseKey(1), 0, 0)
    out = torch.empty(0, 3, device=DEVICE)
    add_noise(out, None, out, None, 0, torch.zeros(1, 2, device=DEVICE), NoiseKey(1), 0, 2)


@triton.jit
def square_root(out, x, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.sqrt_rn(tl.load(x + at)))


def test_the_square_root_is_correctly_rounded():
    """Every float32 in [1, 4): all others differ by a power of four."""
    first = torch.tensor(1.0).view(torch.int32).item()
    x = torch.arange(first, first + (1 << 24), dtype=torch.int32, device=DEVICE).view(torch.float32)
    assert x[-1] < 4
    out, block = torch.full_like(x, NAN), 1 << 20 if DEVICE.type == "cpu" else 1024
    square_root[(len(x) // block,)](out, x, block, enable_fp_fusion=False)
    assert same(out, x.double().sqrt().float())


# ---- add_noise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise_is", ["drawn", "given"])
def test_add_noise(seed, dtype, noise_is):
    rng = seeded(seed, dtype, noise_is)
    coefficients = torch.rand(10, 2, device=DEVICE)
    for shape in (*SHAPES, (2, 1, 1, 1025)):
        b, key, draw = shape[0], key_of(rng, shape[0]), rng.getrandbits(32)
        x0 = filled(rng.choice(KINDS), shape, rng.choice(DTYPES))
        noise = filled(rng.choice(KINDS), shape, rng.choice(DTYPES)) if noise_is == "given" else None
        out, memory = poisoned(rng.choice(KINDS), shape, dtype)
        noise_out, noise_memory = poisoned(rng.choice(KINDS), shape, rng.choice(DTYPES))
        t = rng.choice([3, -1, 10, torch.tensor([rng.randrange(-2, 12) for _ in range(b)], device=DEVICE)])
        add_noise(out, noise_out, x0, noise, t, coefficients, key, draw, 2)
        z = drawn(shape, key, draw, 2) if noise is None else noise.float()
        times = t if isinstance(t, Tensor) else torch.full((b,), t, device=DEVICE)
        expected = add_noise_reference.add_noise(x0, z, times, coefficients)
        assert same(out, expected.to(dtype)), (shape, t)
        assert same(noise_out, z.to(noise_out.dtype))
        assert outside_is_untouched(noise_out, noise_memory)
        if not expected.isnan().any():
            assert outside_is_untouched(out, memory)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_outputs_round_to_nearest_even(dtype):
    """Every tie between two neighbours, their neighbours, and NaNs of every payload."""
    grid = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    grid = torch.cat([grid[grid.isfinite()], torch.tensor([65520.0, 65519.9, 3.4e38, 6e-8, 3e-8, 2.9e-8])])
    step = torch.nextafter(grid, torch.tensor(math.inf)) - grid
    following = (grid.to(dtype).view(torch.int16) + 1).view(dtype).float()
    ties = ((grid.double() + following.double()) / 2).float()
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    x0 = torch.cat([grid, ties, ties + step, ties - step, nans]).to(DEVICE)[None]
    out, one = torch.empty_like(x0, dtype=dtype), torch.tensor([[1.0, 0.0]], device=DEVICE)
    add_noise(out, None, x0, torch.zeros_like(x0), 0, one, NoiseKey(0), 0, 2)
    assert same(out, (x0 + 0.0).to(dtype))


def test_why_missing(monkeypatch):
    assert why_missing("cuda") is None
    assert "no Triton kernels" in (why_missing("mps") or "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET" in (why_missing("cpu") or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_missing("cpu") is None
