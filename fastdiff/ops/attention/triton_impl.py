"""Attention as one Triton kernel: FlashAttention-2's loop over keys (Dao 2023, Algorithm 1), its softmax in base 2.

A program owns BLOCK_M queries and walks the keys BLOCK_N at a time. Scores, statistics and the output's accumulators
are float32 in registers; nothing of size N × M is stored. A head of D channels is TILE + REST of them, two powers of
two (40 = 32 + 16 with a mask, 80 = 64 + 16, 160 = 128 + 32), not D rounded up to one.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops.triton_support import chip_here

LOG2_E = math.log2(math.e)
SHORT = 256  # keys of which a program can hold all scores
SMALLEST = 16  # channels of a tile: what a tensor core's multiplication sums over


class Tiles(NamedTuple):
    """How one chip computes one head size; the columns of tiles.json."""

    block_m: int  # queries of a program
    block_n: int  # keys of a step; 0 takes all at once (short_kernel)
    depth: int  # channels of q and k multiplied at a time, read again in every step; 0 holds all of q on the chip
    columns: int  # channels of the output that a program computes (short_kernel: at a time); 0 is all
    num_warps: int
    num_stages: int
    hoist: int  # 0 computes addresses anew in every step, which costs fewer registers


@triton.jit
def load_rows(base, rows, row_stride, columns, column_stride, limit, D: tl.constexpr, WIDE: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """[rows, columns] from ``base`` on; 0 where ROWS and a row is ``limit`` or more, or COLUMNS and a column D."""
    at, along = rows[:, None], columns[None, :]
    if WIDE:
        at, along = at.to(tl.int64), along.to(tl.int64)
    pointers = base + at * row_stride + along * column_stride
    if ROWS and COLUMNS:
        return tl.load(pointers, mask=(rows[:, None] < limit) & (columns[None, :] < D), other=0.0)
    elif ROWS:
        return tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
    elif COLUMNS:
        return tl.load(pointers, mask=columns[None, :] < D, other=0.0)
    else:
        return tl.load(pointers)


# Not specialised: Triton would else compile the kernel anew for a length that is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["H", "N", "M"])
def attention_kernel(
    out, q, k, v, scale, H, N, M, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D: tl.constexpr, TILE: tl.constexpr, REST: tl.constexpr, DEPTH: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    HOIST: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """out [B, N, H, D] = softmax₂(q kᵀ · scale) v. Strides but the last are in units of UNIT elements.

    ``scale`` holds the factor log₂ e. WIDE: a block spans 2³¹ elements or more. EVEN: BLOCK_N divides M.
    LAST: M where a loop needs a constant end, as in Triton 3.6's interpreter; else 0.
    """
    # Programs that share keys and values run side by side, so that those are still in the cache.
    program = tl.program_id(0)
    row_blocks = tl.cdiv(N, BLOCK_M)
    column = program % COLUMN_BLOCKS * TILE
    head = program // COLUMN_BLOCKS // row_blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    first = program // COLUMN_BLOCKS % row_blocks * BLOCK_M
    q += (b * q_b + h * q_h + first.to(tl.int64) * q_n) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT + column.to(tl.int64) * v_d
    q_n, k_n, v_n = q_n * UNIT, k_n * UNIT, v_n * UNIT

    # Queries past the end repeat the last one and are not stored, so that their loads need no mask.
    rows = tl.minimum(tl.arange(0, BLOCK_M), N - 1 - first)
    keys, tile = tl.arange(0, BLOCK_N), tl.arange(0, TILE)
    RAGGED: tl.constexpr = TILE * COLUMN_BLOCKS > D  # the (last) tile has columns past D
    if DEPTH == 0:
        q_tile = load_rows(q, rows, q_n, tile, q_d, N, D, WIDE, False, RAGGED)
    accumulator = tl.zeros((BLOCK_M, TILE), tl.float32)
    if REST > 0:
        rest = TILE + tl.arange(0, REST)
        if DEPTH == 0:
            q_rest = load_rows(q, rows, q_n, rest, q_d, N, D, WIDE, False, TILE + REST > D)
        rest_accumulator = tl.zeros((BLOCK_M, REST), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # the largest score so far
    total = tl.zeros((BLOCK_M,), tl.float32)  # Σ 2^(score − top)

    for start in tl.range(0, LAST if LAST > 0 else M, BLOCK_N, disable_licm=not HOIST):
        k_block, v_block = k + tl.cast(start, tl.int64) * k_n, v + tl.cast(start, tl.int64) * v_n
        left = M - start
        if DEPTH == 0:
            k_tile = load_rows(k_block, keys, k_n, tile, k_d, left, D, WIDE, not EVEN, RAGGED)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            if REST > 0:
                k_rest = load_rows(k_block, keys, k_n, rest, k_d, left, D, WIDE, not EVEN, TILE + REST > D)
                scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
        else:
            scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for depth in range(0, D, DEPTH):
                channels = depth + tl.arange(0, DEPTH)
                q_part = load_rows(q, rows, q_n, channels, q_d, N, D, WIDE, False, D % DEPTH > 0)
                k_part = load_rows(k_block, keys, k_n, channels, k_d, left, D, WIDE, not EVEN, D % DEPTH > 0)
                scores = tl.dot(q_part, tl.trans(k_part), scores, input_precision=PRECISION)
        scores *= scale
        if not EVEN:
            scores = tl.where(keys[None, :] < left, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        top = new_top
        total = total * shrink + tl.sum(weights, 1)
        v_tile = load_rows(v_block, keys, v_n, tile, v_d, left, D - column, WIDE, not EVEN, RAGGED)
        weights = weights.to(v_tile.dtype)
        accumulator = tl.dot(weights, v_tile, accumulator * shrink[:, None], input_precision=PRECISION)
        if REST > 0:
            v_rest = load_rows(v_block, keys, v_n, rest, v_d, left, D, WIDE, not EVEN, TILE + REST > D)
            rest_accumulator = tl.dot(weights, v_rest, rest_accumulator * shrink[:, None], input_precision=PRECISION)

    inverse = 1.0 / total
    inside = first + tl.arange(0, BLOCK_M) < N
    at = (first + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * (H * D)
    out += (b * N * H + h) * D
    pointers = out + at + (column + tile)[None, :]
    value = (accumulator * inverse[:, None]).to(out.dtype.element_ty)
    tl.store(pointers, value, mask=inside[:, None] & ((column + tile)[None, :] < D))
    if REST > 0:
        value = (rest_accumulator * inverse[:, None]).to(out.dtype.element_ty)
        tl.store(out + at + rest[None, :], value, mask=inside[:, None] & (rest[None, :] < D))


@triton.jit(do_not_specialize=["H", "N", "M"])
def short_kernel(
    out, q, k, v, scale, H, N, M, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for few keys and wide heads: a query's scores of all keys are in registers at once.

    q and k are read DEPTH channels at a time, and then v COLUMNS at a time, each once: nothing is computed twice, and
    no sum is rescaled. KEYS, a power of two, is M or more; EVEN: it is M.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(N, BLOCK_M)
    head, first = program // row_blocks, program % row_blocks * BLOCK_M
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q += (b * q_b + h * q_h + first.to(tl.int64) * q_n) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    q_n, k_n, v_n = q_n * UNIT, k_n * UNIT, v_n * UNIT
    rows, keys = tl.minimum(tl.arange(0, BLOCK_M), N - 1 - first), tl.arange(0, KEYS)

    scores = tl.zeros((BLOCK_M, KEYS), tl.float32)
    for depth in range(0, D, DEPTH):
        channels = depth + tl.arange(0, DEPTH)
        q_part = load_rows(q, rows, q_n, channels, q_d, N, D, WIDE, False, D % DEPTH > 0)
        k_part = load_rows(k, keys, k_n, channels, k_d, M, D, WIDE, not EVEN, D % DEPTH > 0)
        scores = tl.dot(q_part, tl.trans(k_part), scores, input_precision=PRECISION)
    scores *= scale
    if not EVEN:
        scores = tl.where(keys[None, :] < M, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    inverse = 1.0 / tl.sum(weights, 1)
    weights = weights.to(v.dtype.element_ty)

    queries = first + tl.arange(0, BLOCK_M)
    out += (b * N * H + h) * D
    at = queries.to(tl.int64)[:, None] * (H * D)
    for column in range(0, D, COLUMNS):
        channels = column + tl.arange(0, COLUMNS)
        v_part = load_rows(v, keys, v_n, channels, v_d, M, D, WIDE, not EVEN, D % COLUMNS > 0)
        value = tl.dot(weights, v_part, input_precision=PRECISION) * inverse[:, None]
        inside = (queries < N)[:, None] & (channels < D)[None, :]
        tl.store(out + at + channels[None, :], value.to(out.dtype.element_ty), mask=inside)


def attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Fill ``out``.

    Args:
        out: [B, N, H, D], contiguous, not empty.
        q, k, v: [B, H, N, D], [B, H, M, D] and [B, H, M, D] of out's dtype and of any strides.
    """
    interpreted = not isinstance(attention_kernel, triton.JITFunction)
    if interpreted and out.dtype == torch.bfloat16:
        # The interpreter would multiply bfloat16's bits as integers.
        wide = torch.empty_like(out, dtype=torch.float32)
        attention(wide, q.float(), k.float(), v.float(), scale)
        out.copy_(wide)
        return
    if q.dtype != torch.float32 and not _vectors(q, k, v):
        # Triton 3.6 gave wrong results on sm_90 where it had to read two-byte elements one by one; it is slow besides.
        q, k, v = (_padded(t) for t in (q, k, v))
        wide = out.new_empty(*out.shape[:3], q.shape[3])
        attention(wide, q, k, v, scale)
        out.copy_(wide[..., : out.shape[3]])
        return
    (B, H, N, D), M = q.shape, k.shape[2]
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        chip = "interpreter" if interpreted else chip_here()
        tiles = tiles_for(chip, q.element_size(), D, "short" if M <= SHORT else "")
        short = tiles.block_n == 0
        tile, rest = split(D) if tiles.columns == 0 else (min(tiles.columns, triton.next_power_of_2(D)), 0)
        column_blocks = triton.cdiv(D, tile) if rest == 0 else 1
        strides = [stride for t in (q, k, v) for stride in t.stride()]
        # Triton only sees whether a stride is a multiple of 16; rows of 40 channels too can be read 16 bytes at a time.
        unit = math.gcd(16, *(stride for i, stride in enumerate(strides) if i % 4 != 3))
        units = [stride if i % 4 == 3 else stride // unit for i, stride in enumerate(strides)]
        keys = max(SMALLEST, triton.next_power_of_2(M)) if short else tiles.block_n
        rows = max(tiles.block_m, keys)
        span = max(rows * t.stride(2) + (D + SMALLEST + tiles.depth) * t.stride(3) for t in (q, k, v))
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        tf32 = tf32 and q.dtype == torch.float32 and chip.startswith("sm_")
        programs = B * H * triton.cdiv(N, tiles.block_m)
        arguments = (out, q, k, v, scale * LOG2_E, H, N, M, *units)
        options = {
            "D": D, "DEPTH": tiles.depth, "BLOCK_M": tiles.block_m, "UNIT": unit, "WIDE": span >= 1 << 31,
            "EVEN": M % keys == 0, "PRECISION": "tf32" if tf32 else "ieee", "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }  # fmt: skip
        if short:
            short_kernel[(programs,)](*arguments, COLUMNS=tiles.columns, KEYS=keys, **options)
            return
        attention_kernel[(programs * column_blocks,)](
            *arguments, TILE=tile, REST=rest, COLUMN_BLOCKS=column_blocks, BLOCK_N=keys, HOIST=tiles.hoist,
            LAST=M if interpreted else 0, **options,
        )  # fmt: skip


def split(D: int) -> tuple[int, int]:
    """TILE and REST, powers of two from 16 on (REST may be 0), with the smallest TILE + REST ≥ D.

    >>> [split(D) for D in (8, 24, 40, 80, 100, 160, 512)]
    [(16, 0), (32, 0), (32, 16), (64, 16), (128, 0), (128, 32), (512, 0)]
    """
    tile = max(SMALLEST, 1 << D.bit_length() - 1)
    if tile >= D:
        return tile, 0
    rest = max(SMALLEST, triton.next_power_of_2(D - tile))
    return (2 * tile, 0) if rest == tile else (tile, rest)


def _vectors(*tensors: Tensor) -> bool:
    """Whether the rows of all are whole vectors of 16 bytes."""
    each = 16 // tensors[0].element_size()
    return all(
        t.shape[3] % each == 0
        and t.stride(3) == 1
        and t.data_ptr() % 16 == 0
        and all(stride % each == 0 for stride in t.stride()[:3])
        for t in tensors
    )


def _padded(t: Tensor) -> Tensor:
    """A copy of [B, H, N, D] with zeros after each row, up to a whole vector."""
    each = 16 // t.element_size()
    return F.pad(t, (0, -t.shape[3] % each)).contiguous()


@lru_cache(maxsize=256)
def tiles_for(chip: str, element_size: int, D: int, kind: str = "") -> Tiles:
    """The chip's tiles, or the default's, for the smallest tuned head size from D on; those of a kind, if any."""
    table = _tables().get(chip) or _tables()["default"]
    sizes = table[f"{8 * element_size}-bit"]
    size = min(int(size) for size in sizes if size.isdigit() and int(size) >= D)
    return Tiles(*sizes.get(f"{size} {kind}", sizes[str(size)]))


@lru_cache(maxsize=1)
def _tables() -> dict:
    return json.loads(Path(__file__).with_name("tiles.json").read_text(encoding="utf-8"))
