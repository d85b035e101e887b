"""group_norm_silu as one Triton kernel, or as two.

A program holds a tile of [pixels, groups, channels of a group] of one sample in registers. Where a tile holds whole
groups, ``whole_kernel`` reads x once and writes the result: two traversals of memory, what a copy moves, so that at
64×256×32×32 in bfloat16 it is 33.5 MB read and as much written (weights, biases and `add` come from the L2 cache).
A larger group takes ``statistics_kernel`` (each tile's mean and sum of squared deviations) and ``normalise_kernel``,
which merges them (Chan, Golub & LeVeque 1983): three traversals. A tile spans enough groups that in channels_last its
rows fill the 32-byte sectors that a GPU's memory is read by, and its elements are dealt to threads along what is
consecutive in memory. The size of a group is known to the compiler, which so knows how rows are aligned; any size will
do. Addresses are int64.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops.group_norm_silu.planes import planes
from fastdiff.ops.triton_view import widen, write

LARGEST_TILE, SMALLEST_TILE = 16384, 1024  # elements: of whole groups, 16 warps of 32 a thread; and two warps
SECTOR = 32  # bytes


class Tiles(NamedTuple):
    """A program's tile, in powers of two, and how many tiles the channels and pixels of a group take."""

    pixels: int
    groups: int
    channels: int
    channel_tiles: int
    pixel_tiles: int

    @property
    def total(self) -> int:
        return self.channel_tiles * self.pixel_tiles


def tiles(pixels: int, groups: int, size: int, bytes_each: int, last: bool) -> Tiles:
    """The tiles for groups of ``size`` channels; of one tile a group where that is not too large."""
    p, c = triton.next_power_of_2(pixels), triton.next_power_of_2(size)
    largest = LARGEST_TILE if bytes_each == 2 else LARGEST_TILE // 2
    if p * c > largest:
        largest //= 2  # what is merged needs registers, too
        if last:
            c = min(c, 256)
            p = min(p, largest // c)
        else:
            p = min(p, 4096)
            c = min(c, largest // p)
    g, whole = 1, c >= size and p >= pixels
    while g < groups and p * g * c * 2 <= largest:
        narrow = last and c >= size and g * size * bytes_each < SECTOR
        if not narrow and not (whole and p * g * c < SMALLEST_TILE):
            break
        g *= 2
    return Tiles(p, g, c, triton.cdiv(size, c), triton.cdiv(pixels, p))


@triton.jit
def place(groups, pixels, SIZE: tl.constexpr, P: tl.constexpr, G: tl.constexpr, C: tl.constexpr):
    """This program's sample, groups [G] and tile, and [P, G, C] of pixels, channels and which of them exist."""
    channel_tiles, pixel_tiles, blocks = tl.cdiv(SIZE, C), tl.cdiv(pixels, P), tl.cdiv(groups, G)
    program = tl.program_id(0)
    tile = program % (channel_tiles * pixel_tiles)
    unit = program // (channel_tiles * pixel_tiles)
    group = unit % blocks * G + tl.arange(0, G)
    within = tile // pixel_tiles * C + tl.arange(0, C)
    pixel = (tile % pixel_tiles).to(tl.int64) * P + tl.arange(0, P)
    channel = group[None, :, None] * SIZE + within[None, None, :]
    known = (group < groups)[None, :, None] & (within < SIZE)[None, None, :]
    return (unit // blocks).to(tl.int64), group, tile, pixel[:, None, None], channel, known


@triton.jit
def at(v, b, pixel, channel):
    return v[0] + b * v[1] + (channel.to(tl.int64) * v[2] + pixel * v[3])


@triton.jit
def load_h(x, x2, add, b, pixel, channel, known, inside, first):
    """cat(x, x2) + add as float32; zeros outside."""
    if len(x2) > 0:
        h = widen(tl.load(at(x, b, pixel, channel), mask=inside & (channel < first), other=0.0))
        second = widen(tl.load(at(x2, b, pixel, channel - first), mask=inside & (channel >= first), other=0.0))
        h = tl.where(channel < first, h, second)
    else:
        h = widen(tl.load(at(x, b, pixel, channel), mask=inside, other=0.0))
    if len(add) > 0:
        h += widen(tl.load(add[0] + b * add[1] + channel, mask=known, other=0.0))
    return h


@triton.jit
def moments(h, inside, count):
    """Mean and sum of squared deviations [G] of each group's elements; ``count`` of them are inside.

    The mean is corrected by the deviations' own, so that it is exact to float32 where it is far above them.
    """
    mean = tl.sum(tl.sum(tl.where(inside, h, 0.0), 2), 0) / count
    d = tl.where(inside, h - mean[None, :, None], 0.0)
    off = tl.sum(tl.sum(d, 2), 0) / count
    return mean, off, tl.sum(tl.sum(d * d, 2), 0) - count * off * off


@triton.jit
def finish(out, weight, bias, b, pixel, channel, known, inside, h, mean, off, rstd, SILU: tl.constexpr):
    """Write silu((h − mean − off) rstd weight + bias)."""
    scale = rstd[None, :, None]
    if weight is not None:
        scale = scale * widen(tl.load(weight + channel, mask=known, other=0.0))
    y = (h - mean[None, :, None] - off[None, :, None]) * scale
    if bias is not None:
        y += widen(tl.load(bias + channel, mask=known, other=0.0))
    if SILU:
        y = silu(y, out[0].dtype.element_ty == tl.float32)
    write(at(out, b, pixel, channel), y, inside)


@triton.jit
def reciprocal_deviation(m2, count, eps, EXACT: tl.constexpr):
    """1 / √(variance + eps); EXACT: correctly rounded."""
    if EXACT:
        return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(m2, count) + eps))
    else:
        return 1.0 / tl.sqrt(m2 / count + eps)


@triton.jit
def silu(y, EXACT: tl.constexpr):
    """y / (1 + exp(−y)); EXACT: to float32's accuracy, where tl.exp and a GPU's division lose bits."""
    if EXACT:
        t = y * -1.4426950408889634  # −y log₂ e, and below what its rounding lost and the constant lacks
        lost = tl.fma(y, -1.4426950408889634, -t) + y * -1.925963033500112e-08
        return tl.div_rn(y, 1.0 + tl.exp2(t) * (1.0 + lost * 0.6931471805599453))
    else:
        return y / (1.0 + tl.exp(-y))


@triton.jit
def whole_kernel(
    out, x, x2, add, weight, bias, groups, pixels, first, eps,
    SILU: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    b, _, _, pixel, channel, known = place(groups, pixels, SIZE, P, G, C)
    inside = known & (pixel < pixels)
    h = load_h(x, x2, add, b, pixel, channel, known, inside, first)
    count = tl.cast(pixels, tl.float32) * SIZE
    mean, off, m2 = moments(h, inside, count)
    rstd = reciprocal_deviation(m2, count, eps, out[0].dtype.element_ty == tl.float32)
    finish(out, weight, bias, b, pixel, channel, known, inside, h, mean, off, rstd, SILU)


@triton.jit
def statistics_kernel(
    partial, x, x2, add, groups, pixels, first, SIZE: tl.constexpr, P: tl.constexpr, G: tl.constexpr, C: tl.constexpr
):
    """partial [B, groups, tiles, 2]: a tile's mean and sum of squared deviations."""
    b, group, tile, pixel, channel, known = place(groups, pixels, SIZE, P, G, C)
    inside = known & (pixel < pixels)
    h = load_h(x, x2, add, b, pixel, channel, known, inside, first)
    mean, off, m2 = moments(h, inside, count_of(tile, pixels, SIZE, P, C))
    count = tl.cdiv(SIZE, C) * tl.cdiv(pixels, P)
    to = partial + ((b * groups + group) * count + tile) * 2
    tl.store(to, mean + off, mask=group < groups)
    tl.store(to + 1, m2, mask=group < groups)


@triton.jit
def count_of(tile, pixels, SIZE: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """How many elements of a group a tile has, float32; exact, as a tile is small."""
    pixel_tiles = tl.cdiv(pixels, P)
    channels = tl.minimum(SIZE - tile // pixel_tiles * C, C)
    return (channels * tl.minimum(pixels - (tile % pixel_tiles).to(tl.int64) * P, P)).to(tl.float32)


@triton.jit
def merged(
    start, begin, TILES: tl.constexpr, mean, known, pixels, SIZE: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    """Of tiles begin, begin + 1, …: elements [MERGED, 1], mean − ``mean`` and squared deviations [MERGED, G]."""
    number = begin + tl.arange(0, MERGED)
    there = (number < TILES)[:, None] & known[None, :]
    at = start[None, :] + number[:, None] * 2
    n = tl.where(number < TILES, count_of(number, pixels, SIZE, P, C), 0.0)[:, None]
    d = tl.where(there, tl.load(at, mask=there, other=0.0) - mean[None, :], 0.0)
    return n, d, tl.load(at + 1, mask=there, other=0.0)


@triton.jit
def normalise_kernel(
    out, partial, x, x2, add, weight, bias, groups, pixels, first, eps,
    SILU: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, G: tl.constexpr, C: tl.constexpr, MERGED: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    b, group, _, pixel, channel, known = place(groups, pixels, SIZE, P, G, C)
    inside = known & (pixel < pixels)
    h = load_h(x, x2, add, b, pixel, channel, known, inside, first)
    # Around the first tile's mean, then around that of all, so that means far apart or far from 0 cost no accuracy.
    start = partial + (b * groups + group) * TILES * 2
    mean = tl.load(start, mask=group < groups, other=0.0)
    total = tl.cast(pixels, tl.float32) * SIZE
    off, m2 = tl.zeros([G], tl.float32), tl.zeros([G], tl.float32)
    for begin in range(0, TILES, MERGED):
        n, d, within = merged(start, begin, TILES, mean, group < groups, pixels, SIZE, P, C, MERGED)
        off += tl.sum(n * d, 0)
    off = off / total
    for begin in range(0, TILES, MERGED):
        n, d, within = merged(start, begin, TILES, mean, group < groups, pixels, SIZE, P, C, MERGED)
        m2 += tl.sum(n * (d - off[None, :]) * (d - off[None, :]) + within, 0)
    rstd = reciprocal_deviation(m2, total, eps, out[0].dtype.element_ty == tl.float32)
    finish(out, weight, bias, b, pixel, channel, known, inside, h, mean, off, rstd, SILU)


class Launch:
    """One call's kernels and their arguments; arguments as for native_impl."""

    def __init__(
        self, out: Tensor, x: Tensor, x2: Tensor | None, add: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        groups: int, eps: float, silu: bool, last: bool,
    ) -> None:  # fmt: skip
        self.batch, channels = out.shape[:2]
        pixels, self.groups = out.shape[2:].numel(), groups
        self.tiles = tiles(pixels, groups, channels // groups, x.element_size(), last)
        self.device, self.out = out.device, view(out, last)
        embedding = () if add is None else (add, add.stride(0) if add.ndim == 2 and len(add) > 1 else 0)
        self.inputs = (view(x, last), view(x2, last), embedding)
        self.affine, self.eps, self.silu = (weight, bias), eps, silu
        self.size, self.sizes = channels // groups, (groups, pixels, x.shape[1])

    def run(self, kernel, *args, **constants) -> None:
        t = self.tiles
        grid = (self.batch * triton.cdiv(self.groups, t.groups) * t.total,)
        warps = min(16, max(1, t.pixels * t.groups * t.channels // 512))  # 16 elements a thread, 32 in the largest tile
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[grid](*args, SIZE=self.size, P=t.pixels, G=t.groups, C=t.channels, num_warps=warps, **constants)

    def whole(self) -> None:
        self.run(whole_kernel, self.out, *self.inputs, *self.affine, *self.sizes, self.eps, SILU=self.silu)

    def partial(self) -> Tensor:
        return torch.empty(self.batch, self.groups, self.tiles.total, 2, device=self.device, dtype=torch.float32)

    def statistics(self, partial: Tensor) -> None:
        self.run(statistics_kernel, partial, *self.inputs, *self.sizes)

    def normalise(self, partial: Tensor) -> None:
        merged = min(64, triton.next_power_of_2(self.tiles.total))
        self.run(normalise_kernel, self.out, partial, *self.inputs, *self.affine, *self.sizes, self.eps,
                 SILU=self.silu, MERGED=merged, TILES=self.tiles.total)  # fmt: skip


def view(tensor: Tensor | None, last: bool) -> tuple:
    """(tensor, sample's stride, channel's, pixel's); empty for no tensor."""
    if tensor is None:
        return ()
    strides = planes(tensor, last)
    assert strides is not None
    return tensor, *strides


def bind(
    out: Tensor, x: Tensor, x2: Tensor | None, add: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    groups: int, eps: float, silu: bool, last: bool,
):  # fmt: skip
    """call(x, x2, add) -> out; the examples are as for native_impl.parameters."""
    shape, strides, dtype, device = out.shape, out.stride(), out.dtype, out.device

    def call(x: Tensor, x2: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        group_norm_silu(out, x, x2, add, weight, bias, groups, eps, silu, last)
        return out

    return call


def group_norm_silu(
    out: Tensor, x: Tensor, x2: Tensor | None, add: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    groups: int, eps: float, silu: bool, last: bool,
) -> None:  # fmt: skip
    """Fill ``out``; arguments as for native_impl."""
    launch = Launch(out, x, x2, add, weight, bias, groups, eps, silu, last)
    if launch.tiles.total == 1:
        launch.whole()
        return
    partial = launch.partial()
    launch.statistics(partial)
    launch.normalise(partial)
