"""randn as one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.noise import NoiseKey
from fastdiff.ops.triton_noise import key_of, normals
from fastdiff.ops.triton_support import key_arguments, launch
from fastdiff.ops.triton_view import place, store, view


@triton.jit(do_not_specialize=["seed", "sample_offset", "draw", "stream"])
def randn_kernel(
    out, seeds, samples, seed: tl.int64, sample_offset: tl.int64, draw: tl.int64, stream: tl.int64, n,
    QUADS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, first, lane, inside = place(n, QUADS)
    s, number = key_of(b, seeds, samples, seed, sample_offset)
    store(out, b, first, lane, inside, normals(first, s, number, draw, stream, QUADS), WIDE)


def randn(out: Tensor, key: NoiseKey, draw: int, stream: int) -> None:
    """Fill ``out`` [B, …], of float32, bfloat16 or float16 and walkable strides."""
    if out.numel() == 0:
        return
    launch(randn_kernel, out, view(out), *key_arguments(key), draw, stream)
