"""conv_epilogue by Triton against the reference, to the bit. Run by test_triton.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, DTYPES, KINDS, filled, outside_is_untouched, poisoned, same, seeded

from fastdiff import ops as op
from fastdiff.ops.conv_epilogue import triton_impl
from fastdiff.ops.conv_epilogue.layout import Walk
from fastdiff.ops.conv_epilogue.reference import conv_epilogue as reference

SHAPES = ((2, 3, 8, 8), (3, 5, 5, 7), (1, 1, 1, 1), (2, 1, 1, 3), (2, 48, 4, 4), (4, 2, 1, 65), (2, 130, 3, 3))


def vector(rng, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every other row and a column less of a larger tensor, so that a stride that is taken for granted shows."""
    memory = torch.randn(2 * shape[0], shape[1] + 1, device=DEVICE).to(rng.choice([dtype, torch.float32]))
    return memory[::2, 1:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(seed, kind, dtype):
    rng = seeded(seed, kind, dtype)
    for shape in SHAPES:
        torch.manual_seed(rng.getrandbits(32))
        out, memory = poisoned(kind, shape, dtype)
        x, residual = (filled(rng.choice(KINDS), shape, dtype) for _ in range(2))
        bias = vector(rng, (1, shape[1]), dtype)[0].contiguous() if rng.random() < 0.7 else None
        add = vector(rng, (rng.choice([1, shape[0]]), shape[1]), dtype) if rng.random() < 0.7 else None
        residual = residual if rng.random() < 0.7 else None
        scale = rng.choice([1.0, 0.7071, -3.0])
        triton_impl.conv_epilogue(out, x, bias, add, residual, scale)
        print(shape, scale, *("absent" if t is None else t.stride() for t in (x, bias, add, residual)))
        assert same(out, reference(x, bias, add, residual, scale).to(dtype))
        assert outside_is_untouched(out, memory)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tiles_of_a_gpu(seed, dtype, monkeypatch):
    """Many programs, each with a tile of the size that a GPU's has."""
    monkeypatch.setattr(triton_impl, "INTERPRETER_TILE", triton_impl.GPU_TILE)
    torch.manual_seed(seed)
    for kind, shape in (("contiguous", (2, 3, 36, 36)), ("channels_last", (2, 72, 5, 7)), ("channels", (3, 130, 3, 3))):
        x, residual, out = filled(kind, shape, dtype), filled("contiguous", shape, dtype), poisoned(kind, shape, dtype)
        bias, add = torch.randn(shape[1], device=DEVICE), torch.randn(shape[:2], device=DEVICE)
        triton_impl.conv_epilogue(out[0], x, bias, add, residual, 0.7)
        assert same(out[0], reference(x, bias, add, residual, 0.7).to(dtype))
        assert outside_is_untouched(*out)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 7), (2, 7, 9), (2, 3, 4, 5, 6)])
def test_through_the_operation(seed, shape, channels_last):
    x, bias, add = torch.randn(shape, device=DEVICE), torch.randn(shape[1], device=DEVICE), torch.randn(shape[:2])
    if channels_last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    add = add.to(DEVICE)
    y = op.conv_epilogue(x, bias=bias, add=add, residual=x, scale=2.0, backend="triton")
    assert y.stride() == x.stride()
    assert same(y, op.conv_epilogue(x, bias=bias, add=add, residual=x, scale=2.0, backend="reference"))


def test_tiles():
    """Powers of two that hold the tile's elements; a row's length is not exceeded where it can be divided."""
    assert triton_impl.tile(Walk(True, 64, 192), 1024) == (16, 64)
    assert triton_impl.tile(Walk(True, 64, 256), 1024) == (4, 256)
    assert triton_impl.tile(Walk(False, 64, 65536), 1024) == (1, 1024)
    assert triton_impl.tile(Walk(False, 64, 15), 1024) == (64, 16)
    for length in range(1, 2000):
        rows, width = triton_impl.tile(Walk(True, 64, length), 1024)
        assert rows * width == 1024
        assert -(-length // width) * width < 2 * length + 2
