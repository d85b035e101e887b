"""conv_epilogue as one Triton kernel: a program computes a tile of rows (see layout.py)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops.conv_epilogue.layout import Walk, row_strides, walk_of
from fastdiff.ops.triton_view import widen, write

# Elements of a tile: on a GPU 8 a thread, 16 bytes of bfloat16. The interpreter's cost is per program.
GPU_TILE, INTERPRETER_TILE, WARPS = 1024, 65536, 4


@triton.jit
def addresses(v, b, row, i):
    """Pointers to elements i of rows (b, row), [ROWS, LENGTH]; a view without an element's stride has 1."""
    starts = (v[0] + (b * v[1] + row * v[2]))[:, None]
    if len(v) == 3:
        return starts + i[None, :]
    else:
        return starts + i[None, :] * v[3]


@triton.jit(do_not_specialize=["scale"])
def conv_epilogue_kernel(
    out, x, residual, bias, add, scale: tl.float32, rows, length, all_rows,
    CHANNELS_LAST: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    blocks = (length + (LENGTH - 1)) // LENGTH
    program = tl.program_id(0)
    number = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = (program % blocks).to(tl.int64) * LENGTH + tl.arange(0, LENGTH)
    in_rows, in_length = (number < all_rows)[:, None], (i < length)[None, :]
    inside = in_rows & in_length
    # WIDE: there are 2³¹ rows or more, so that they need int64 division.
    if not WIDE:
        number = number.to(tl.uint32)
    b = (number // tl.cast(rows, number.dtype)).to(tl.int64)
    row = (number % tl.cast(rows, number.dtype)).to(tl.int64)

    y = widen(tl.load(addresses(x, b, row, i), mask=inside))
    if (bias is not None) or (len(add) > 0):
        # No wider than they must be: [1, LENGTH] or [ROWS, 1], but for a sample's own numbers along the channels.
        if CHANNELS_LAST:
            channel, for_bias, for_add = i[None, :], in_length, inside
        else:
            channel, for_bias, for_add = row[:, None], in_rows, in_rows
        if len(add) > 0:
            shift = widen(tl.load(add[0] + b[:, None] * add[1] + channel, mask=for_add))
            if bias is not None:
                shift = widen(tl.load(bias + channel, mask=for_bias)) + shift
        else:
            shift = widen(tl.load(bias + channel, mask=for_bias))
        y = y + shift
    if len(residual) > 0:
        y = y + widen(tl.load(addresses(residual, b, row, i), mask=inside))
    if SCALED:
        y = y * scale
    write(addresses(out, b, row, i), y, inside)


def tile(walk: Walk, elements: int) -> tuple[int, int]:
    """(ROWS, LENGTH), powers of two: of the lengths of 64 and more, the largest of those that waste the least."""
    if walk.length <= 64:
        length = triton.next_power_of_2(walk.length)
    else:
        lengths = [1 << k for k in range(6, elements.bit_length())]
        length = min(lengths, key=lambda n: (triton.cdiv(walk.length, n) * n, -n))
    return elements // length, length


def view(tensor: Tensor | None, walk: Walk) -> tuple:
    """(tensor, sample's stride, row's stride), and an element's stride where it is not 1; empty for no tensor."""
    if tensor is None:
        return ()
    sample, row, element = row_strides(tensor, walk)
    return (tensor, sample, row) if element == 1 or walk.length == 1 else (tensor, sample, row, element)


def bind(
    out: Tensor, x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
):  # -> call(x, add, residual) -> out
    """A call for tensors of these layouts; arguments as for native_impl."""
    shape, strides, dtype, device = out.shape, out.stride(), out.dtype, out.device

    def call(x: Tensor, add: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        conv_epilogue(out, x, bias, add, residual, scale)
        return out

    return call


def conv_epilogue(
    out: Tensor, x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
) -> None:
    """Fill ``out``; arguments as for ``bind``."""
    walk = walk_of(out)
    all_rows = len(out) * walk.rows
    elements = GPU_TILE if isinstance(conv_epilogue_kernel, triton.JITFunction) else INTERPRETER_TILE
    rows, length = tile(walk, elements)
    grid = (triton.cdiv(all_rows, rows) * triton.cdiv(walk.length, length),)
    per_sample = () if add is None else (add, 0 if len(add) == 1 else add.stride(0))
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        conv_epilogue_kernel[grid](
            view(out, walk), view(x, walk), view(residual, walk), bias, per_sample, scale, walk.rows, walk.length,
            all_rows, CHANNELS_LAST=walk.channels_last, SCALED=scale != 1, WIDE=all_rows >= 1 << 31,
            ROWS=rows, LENGTH=length, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
