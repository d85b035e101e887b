"""A convolution as one Triton kernel: an implicit matrix product of pixels and taps, with everything after it.

A program owns BM pixels and BN channels of the output and walks K, which is the taps' channels and then those of the
pointwise inputs, BK at a time; nothing is unfolded in memory. Where the output has too few tiles to fill a GPU, SPLIT
programs share a tile: each leaves its partial sum in float32, and the last to come adds them in their order, so that
the result does not depend on which it was.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops.triton_support import chip_here

BK = 64  # channels of a step; of float32 numbers half as many, in as much shared memory
FULL = 110  # tiles that keep a large GPU (132 multiprocessors) busy without sharing


class Tiles(NamedTuple):
    """A program's part of the output, and how many programs share it."""

    pixels: int
    channels: int
    num_warps: int
    num_stages: int
    split: int = 1


# From the largest on, the first with FULL tiles serves. The last is for outputs of few tiles, which are shared.
# sm_90's were measured on an H100 in bfloat16; the others' fit their shared memory. float32's products are no tensor
# core's, and their operands fill registers.
TILES = {
    "sm_90": (Tiles(128, 256, 8, 3), Tiles(128, 128, 8, 3), Tiles(64, 128, 4, 4), Tiles(64, 64, 4, 4)),
    "sm_80": (Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 3), Tiles(64, 64, 4, 3)),
    "other": (Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2)),
    "float32": (Tiles(64, 32, 4, 2),),
}
SHARES = 96  # programs among which few tiles are divided


def tiles_for(chip: str, pixels: int, channels: int, steps: int, residual: bool = False, moved: bool = False) -> Tiles:
    """The tiles of an output [pixels, channels] that sums ``steps`` blocks of K; ``moved`` where pixels are not x's.

    >>> tiles_for("sm_90", 64 * 16 * 16, 256, 36)
    Tiles(pixels=128, channels=256, num_warps=8, num_stages=3, split=1)
    >>> tiles_for("sm_90", 16 * 16, 256, 36)
    Tiles(pixels=64, channels=32, num_warps=4, num_stages=4, split=3)
    """
    *large, small = TILES.get(chip, TILES["other"])
    for tiles in large:
        if (residual or moved) and tiles.pixels * tiles.channels > 1 << 14:
            continue  # the addresses of a residual, or of other pixels, would not fit in the registers beside the sums
        if tiles.channels <= channels and _count(pixels, channels, tiles) >= FULL:
            # On an H100 four warps were faster than eight where there is a residual; why is not known.
            return tiles._replace(num_warps=4) if residual and not moved and chip == "sm_90" else tiles
    # Smaller tiles are more of them, and so work for more multiprocessors.
    if pixels <= 64:
        small = small._replace(pixels=16)
    elif _count(pixels, channels, small) < SHARES // 3:
        small = small._replace(channels=32)
    count = _count(pixels, channels, small)
    if count >= FULL:
        return small
    # A share costs its part of the reduction, 1.5 to 2 µs on an H100 (docs/h100.md): none is of fewer than six steps.
    return small._replace(split=max(1, min(steps // 6, triton.cdiv(SHARES, count))))


def _count(pixels: int, channels: int, tiles: Tiles) -> int:
    return triton.cdiv(pixels, tiles.pixels) * triton.cdiv(channels, tiles.channels)


@triton.jit
def pointwise(acc, x, weights, m, known, split, C: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr):
    """acc + x wᵀ of this program's share of the C channels of x [pixels, C]."""
    k = tl.arange(0, STEP)
    STEPS: tl.constexpr = (C // STEP + SPLIT - 1) // SPLIT
    for i in range(STEPS):
        j = split * STEPS + i
        pixels, columns = x + (m * C + j * STEP)[:, None] + k[None, :], weights + (j * STEP + k)[None, :]
        if C // STEP % SPLIT == 0:
            a, w = tl.load(pixels, mask=known[:, None], other=0.0), tl.load(columns)
        else:  # the last share is smaller
            within = (j * STEP + k < C)[None, :]
            a = tl.load(pixels, mask=known[:, None] & within, other=0.0)
            w = tl.load(columns, mask=within, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def sums(bias, residual, at, n, inside, N, BM: tl.constexpr, BN: tl.constexpr):
    """bias + residual, where there are any: what a tile's sum begins with."""
    acc = tl.zeros((BM, BN), tl.float32)
    if residual is not None:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "HI", "WI", "HO", "WO"])
def conv_kernel(
    out, x, x1, x2, weights, bias, residual, partial, counters, M, HI, WI, HO, WO,
    N: tl.constexpr, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr,
    LOW: tl.constexpr, UP: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """out [pixels, N], channels last. UP: four phases of a doubled grid, M pixels of the small one in each."""
    TAPS: tl.constexpr = SIDE * SIDE
    K: tl.constexpr = TAPS * C + C1 + C2
    blocks_n: tl.constexpr = (N + BN - 1) // BN
    blocks_m = tl.cdiv(M, BM)
    # Eight rows of tiles at a time, so that their pixels and weights are still in the cache.
    program, split = tl.program_id(0), tl.program_id(1)
    phase = program // (blocks_m * blocks_n)
    tile = program % (blocks_m * blocks_n)
    band = tile // (8 * blocks_n)
    height = tl.minimum(blocks_m - band * 8, 8)
    row = band * 8 + tile % (8 * blocks_n) % height
    n = tile % (8 * blocks_n) // height * BN + tl.arange(0, BN)
    m = row * BM + tl.arange(0, BM)
    known = m < M
    if WIDE:
        m = m.to(tl.int64)
    b, y, left = m // (HO * WO), m // WO % HO, m % WO
    if UP:
        dy, dx = phase // 2 - 1, phase % 2 - 1
    else:
        dy, dx = -LOW, -LOW
    # The window's first pixel, and a bit for each of its taps that lies in the image.
    corner, there = (b * HI + y * STRIDE + dy) * WI + left * STRIDE + dx, tl.zeros((BM,), tl.int32)
    for t in tl.static_range(TAPS):
        iy, ix = y * STRIDE + t // SIDE + dy, left * STRIDE + t % SIDE + dx
        inside = known & (iy >= 0) & (iy < HI) & (ix >= 0) & (ix < WI)
        there |= inside.to(tl.int32) << t
    # Channels past N repeat the last one and are not stored, so that their loads need no mask.
    weights += (phase * N + tl.minimum(n, N - 1))[:, None].to(tl.int64) * K

    if UP:
        row = (b * (2 * HO) + 2 * y + phase // 2) * (2 * WO) + 2 * left + phase % 2
    else:
        row = m
    at = row[:, None] * N + n[None, :]
    stored = known[:, None] & (n < N)[None, :]
    if SPLIT == 1:
        acc = sums(bias, residual, at, n, stored, N, BM, BN)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, STEP)
    CHUNKS: tl.constexpr = C // STEP
    STEPS: tl.constexpr = (TAPS * CHUNKS + SPLIT - 1) // SPLIT
    for i in range(STEPS):
        j = split * STEPS + i
        tap, c = j // CHUNKS, j % CHUNKS * STEP
        reached = (there >> tap & 1) != 0
        pixels = x + ((corner + (tap // SIDE * WI + tap % SIDE)) * C + c)[:, None] + k[None, :]
        columns = weights + (j * STEP + k)[None, :]
        if TAPS * CHUNKS % SPLIT == 0:
            a, w = tl.load(pixels, mask=reached[:, None], other=0.0), tl.load(columns)
        else:  # the last share is smaller
            within = (j * STEP + k < TAPS * C)[None, :]
            a = tl.load(pixels, mask=reached[:, None] & within, other=0.0)
            w = tl.load(columns, mask=within, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
    if C1 > 0:
        acc = pointwise(acc, x1, weights + TAPS * C, m, known, split, C1, SPLIT, STEP)
    if C2 > 0:
        acc = pointwise(acc, x2, weights + (TAPS * C + C1), m, known, split, C2, SPLIT, STEP)

    if SPLIT > 1:
        within = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        shares = partial + program.to(tl.int64) * (SPLIT * BM * BN)
        tl.store(shares + split * (BM * BN) + within, acc)
        tl.debug_barrier()  # every thread's part is stored before this program is counted
        # Release and acquire: the last to be counted sees what the others stored before they were.
        if tl.atomic_add(counters + program, 1, sem="acq_rel") == SPLIT - 1:
            acc = sums(bias, residual, at, n, stored, N, BM, BN)
            # .cg reads the L2 cache, which multiprocessors share; this one's L1 knows nothing of the others' stores.
            for i in range(SPLIT):
                acc += tl.load(shares + i * (BM * BN) + within, cache_modifier=".cg")
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=stored)
            tl.store(counters + program, 0)  # for the next convolution that counts here
    else:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=stored)


COUNTERS = 1024  # more than a convolution whose tiles are shared has
_local = threading.local()


def counters(device: torch.device) -> Tensor | None:
    """Zeros that the convolutions of this thread count in, one after another on the current stream.

    None under a capture: a graph may run beside other graphs and calls, so that each of its convolutions has its own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    key = device, torch.cuda.current_stream(device).cuda_stream
    kept: dict[Any, Tensor] = _local.__dict__.setdefault("counters", {})
    if key not in kept:
        kept[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return kept[key]


def conv(
    out: Tensor, x: Tensor, inputs: tuple[Tensor, ...], weights: Tensor, bias: Tensor | None, residual: Tensor | None,
    side: int, stride: int, low: int, up: bool, counters: Tensor | None,
) -> None:  # fmt: skip
    """Fill ``out`` [B, N, HO, WO]; every image is dense and channels_last, and not empty.

    Args:
        x, inputs: [B, C, HI, WI] and up to two of [B, Ci, HO, WO].
        weights: [1 or 4 phases, N, side² C + Σ Ci], a tap's channels side by side.
        bias: [N], contiguous.
        side, stride, low: of the window; how many pixels before the first it begins.
        up: whether ``out`` is the doubled grid, in four phases.
        counters: zeros, int32, at least one a tile; they are zeros again afterwards. None makes some.
    """
    interpreted = not isinstance(conv_kernel, triton.JITFunction)
    if interpreted and out.dtype == torch.bfloat16:
        # The interpreter would multiply bfloat16's bits as integers.
        wide = torch.empty_like(out, dtype=torch.float32)
        floats: list[Any] = [None if t is None else t.float() for t in (x, weights, residual)]
        conv(wide, floats[0], tuple(t.float() for t in inputs), floats[1], bias, floats[2],
             side, stride, low, up, counters)  # fmt: skip
        out.copy_(wide)
        return
    batch, channels, height, width = x.shape
    heights, widths = (height, width) if up else out.shape[2:]
    pixels, N = batch * heights * widths, out.shape[1]
    phases = len(weights)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        chip = "float32" if x.dtype == torch.float32 else "interpreter" if interpreted else chip_here()
        tiles = tiles_for(chip, phases * pixels, N, weights.shape[2] // BK, residual is not None, up or stride > 1)
        grid = (phases * _count(pixels, N, tiles), tiles.split)
        partial = None
        if tiles.split > 1:
            partial = torch.empty(
                grid[0] * tiles.split * tiles.pixels * tiles.channels, dtype=torch.float32, device=x.device
            )
            if counters is None or counters.numel() < grid[0]:
                counters = torch.zeros(grid[0], dtype=torch.int32, device=x.device)
        x1, x2 = (*inputs, None, None)[:2]
        large = max(t.numel() for t in (x, out, *inputs)) >= 1 << 31
        step = BK * 2 // x.element_size()
        conv_kernel[grid](
            out, x, x1, x2, weights, bias, residual, partial, counters, pixels, height, width, heights, widths,
            N=N, C=channels, C1=0 if x1 is None else x1.shape[1], C2=0 if x2 is None else x2.shape[1], SIDE=side,
            STRIDE=stride, LOW=low, UP=up, WIDE=large, SPLIT=tiles.split, BM=tiles.pixels, BN=tiles.channels, STEP=step,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
