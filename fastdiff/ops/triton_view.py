"""How a Triton kernel sees a tensor: elements of one sample at the strides of ops.view, widened to float32.

A view is a tuple (pointer, batch stride) where a sample is contiguous, so that such a kernel is compiled with vector
accesses, else (pointer, batch stride, inner, outer, step); an absent tensor is the empty tuple. Elements are named by
``first``, a program's first element (int64), and the lanes after it; addresses are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops.view import strides_of


def view(tensor: Tensor | None) -> tuple:
    """The view of a [B, …] tensor whose strides a kernel can walk (ops.view.viewable)."""
    if tensor is None:
        return ()
    strides = strides_of(tensor)
    assert strides is not None
    if strides.step == 1 and strides.inner >= tensor.numel() // (len(tensor) or 1):
        return tensor, strides.batch
    return tensor, *strides


@triton.jit
def place(n, QUADS: tl.constexpr):
    """This program's sample, first element, lanes, and which of the lanes lie inside the sample."""
    n = tl.cast(n, tl.int64)
    blocks = ((n + (4 * QUADS - 1)) // (4 * QUADS)).to(tl.int32)
    program = tl.program_id(0)
    first = (program % blocks).to(tl.int64) * (4 * QUADS)
    lane = tl.arange(0, 4 * QUADS)
    return (program // blocks).to(tl.int64), first, lane, first + lane < n


@triton.jit
def addresses(v, b, first, lane, WIDE: tl.constexpr):
    """Pointers to elements first + lane of sample b. WIDE: n is 2³¹ or more, so that they need int64 division."""
    sample = v[0] + b * v[1]
    if len(v) == 2:
        return sample + first + lane
    else:
        e = first + lane
        if not WIDE:
            e = e.to(tl.uint32)
        inner = tl.cast(v[2], e.dtype)
        return sample + (e // inner).to(tl.int64) * v[3] + (e % inner).to(tl.int64) * v[4]


@triton.jit
def widen(value):
    """Values of any of the three dtypes as float32."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def write(pointers, value, mask):
    """Write float32 values in the pointers' dtype, rounded to nearest even."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if dtype == tl.bfloat16:
        # By integers: the interpreter's own conversion to bfloat16 does not round to even.
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False) >> 16
        bits = tl.where(value == value, bits, 0x7FC0)
        tl.store(pointers, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, value.to(dtype), mask=mask)


@triton.jit
def load(v, b, first, lane, inside, WIDE: tl.constexpr):
    """Elements first + lane of sample b as float32."""
    return widen(tl.load(addresses(v, b, first, lane, WIDE), mask=inside))


@triton.jit
def store(v, b, first, lane, inside, value, WIDE: tl.constexpr):
    """Write float32 values in the view's dtype, rounded to nearest even."""
    write(addresses(v, b, first, lane, WIDE), value, inside)
