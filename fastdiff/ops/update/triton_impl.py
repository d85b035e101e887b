"""update as one Triton kernel: csrc/common/row.h's arithmetic, in its order.

A tensor that is None, or an empty tuple, is compiled out. One that is given but not used by the row at hand is skipped
by a branch on the row's coefficient, which is the same for the whole grid.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.noise import KNOWN
from fastdiff.ops.triton_noise import key_of, normals
from fastdiff.ops.triton_support import key_arguments, launch
from fastdiff.ops.triton_view import load, place, store, view
from fastdiff.ops.update.deviance import BLOCK
from fastdiff.ops.update.operands import Operands
from fastdiff.plan.plan import COLUMNS, TERMS

_NEXT_C_IN, _W, _P, _Q, _CLIP, _SCALE, _X, _ANCHOR, _SLOT, _READ, _WRITE = (
    tl.constexpr(COLUMNS.index(name))
    for name in ["next_c_in", "w0", "p", "q", "clip", "scale", "x.x", "anchor.x", "slot.x", "read0", "write"]
)
_KEEPS_ANCHOR, _LOG_MIN, _LOG_MAX, _KNOWN_ALPHA, _KNOWN_SIGMA, _DRAW, _STREAM = (
    tl.constexpr(COLUMNS.index(name))
    for name in ["keeps_anchor", "log_min", "log_max", "known_alpha", "known_sigma", "draw", "stream"]
)
_OF_ANCHOR, _OF_SLOT0, _OF_Z, _OF_G = (tl.constexpr(TERMS.index(name)) for name in ("anchor", "slot0", "z", "g"))
_COLUMNS, _KNOWN, _BLOCK = tl.constexpr(len(COLUMNS)), tl.constexpr(KNOWN), tl.constexpr(BLOCK)


@triton.jit
def _uses(row, term: tl.constexpr):
    """Whether any output that this row writes has a coefficient of the term."""
    keeps, writes = tl.load(row + _KEEPS_ANCHOR) != 0, tl.load(row + _WRITE) >= 0
    by_x, by_anchor = tl.load(row + _X + term) != 0, tl.load(row + _ANCHOR + term) != 0
    return by_x | (keeps & by_anchor) | (writes & (tl.load(row + _SLOT + term) != 0))


@triton.jit
def _read(row, term: tl.constexpr, source, at, inside, zeros):
    """A term's tensor where the row uses it."""
    value = zeros
    if _uses(row, term):
        value = tl.load(source + at, mask=inside)
    return value


@triton.jit
def _read_slot(row, k: tl.constexpr, slots, at, inside, zeros):
    """The k-th slot that the row reads, by the number in its table. slots: (pointer, number) of those there are."""
    value = zeros
    for i in tl.static_range(len(slots)):
        if (tl.load(row + _READ + k) == slots[i][1]) & _uses(row, _OF_SLOT0 + k):
            value = tl.load(slots[i][0] + at, mask=inside)
    return value


@triton.jit
def _combine(row, output: tl.constexpr, terms, zeros):
    """The linear combination of one output: terms in order, a zero coefficient skips its term."""
    total = zeros
    for k in tl.static_range(9):
        if terms[k] is not None:
            coefficient = tl.load(row + output + k)
            if coefficient != 0:
                total = total + terms[k] * coefficient
    return total


@triton.jit
def _predict_x0(x, m, p, q, bound, scale):
    """p x + q m, clamped to ±bound and scaled; NaN passes through."""
    x0 = x * p + m * q
    x0 = tl.where(bound < x0, bound, x0)
    x0 = tl.where(x0 < -bound, -bound, x0)
    return x0 * scale


@triton.jit
def _exp_in_range(y):
    """exp(y) for |y| ≤ 87; NaN passes through."""
    shifted = y * 1.44269504 + 12582912.0
    k = shifted - 12582912.0
    r = (y - k * 0.693359375) - k * -2.12194440e-4
    e = r * 1.9875691500e-4 + 1.3981999507e-3
    e = e * r + 8.3334519073e-3
    e = e * r + 4.1665795894e-2
    e = e * r + 1.6666665459e-1
    e = e * r + 5.0000001201e-1
    e = e * (r * r) + r + 1.0
    power = tl.add(shifted.to(tl.int32, bitcast=True) << 23, 0x3F800000, sanitize_overflow=False)
    return e * power.to(tl.float32, bitcast=True)


@triton.jit
def _learned_log_sigma(v, log_min, log_max):
    """ln σ, clamped to ±87; NaN passes through."""
    f = (v + 1.0) * 0.5
    y = (f * log_max + (1.0 - f) * log_min) * 0.5
    y = tl.where(y > 87.0, 87.0, y)
    return tl.where(y < -87.0, -87.0, y)


@triton.jit
def _block_sums(deviance, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """The sums of BLOCKS rows of WIDTH elements, in the order of ops/update/deviance.py."""
    rows = tl.reshape(deviance, [BLOCKS, WIDTH])
    for k in tl.static_range(10):
        if (WIDTH >> k) > 1:
            rows = tl.sum(tl.reshape(rows, [BLOCKS, 2, WIDTH >> (k + 1)]), axis=1)  # of two numbers: in no other order
    return tl.reshape(rows, [BLOCKS])


@triton.jit(do_not_specialize=["index", "seed", "sample_offset", "deviance_row"])
def update_kernel(
    table, index: tl.int64, step, outputs, variance, x, anchor, slots, noise, gain, clip, gradient, mask, known,
    known_noise, x_out, anchor_out, slots_out, x0_out, model_input, nonfinite, deviance, deviance_row: tl.int64,
    seeds, samples, seed: tl.int64, sample_offset: tl.int64, n, QUADS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    if step is not None:
        index = tl.load(step)
    index = tl.cast(index, tl.int64)
    row = table + index * _COLUMNS
    b, first, lane, inside = place(n, QUADS)
    at = b * n + first + lane
    zeros = tl.zeros([4 * QUADS], tl.float32)
    s, number = key_of(b, seeds, samples, seed, sample_offset)
    draw, stream = tl.load(row + _DRAW).to(tl.int32), tl.load(row + _STREAM).to(tl.int32)

    # What the row reads.
    x_in = tl.load(x + at, mask=inside)
    m = zeros
    if len(outputs) > 0:
        m = load(outputs[0], b, first, lane, inside, WIDE)
        if len(outputs) > 1:
            m = m * tl.load(row + _W)
            for k in tl.static_range(1, len(outputs)):
                m = m + load(outputs[k], b, first, lane, inside, WIDE) * tl.load(row + _W + k)
        if nonfinite is not None:
            bad = inside & ((m.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000)
            if tl.max(bad.to(tl.int32), axis=0) != 0:
                tl.atomic_min(nonfinite, index, sem="relaxed")
        if gain is not None:
            m = m * tl.load(gain + b)
    anchor_in, slot0, slot1, slot2, g = None, None, None, None, None
    if anchor is not None:
        anchor_in = _read(row, _OF_ANCHOR, anchor, at, inside, zeros)
    if len(slots) > 0:
        slot0 = _read_slot(row, 0, slots, at, inside, zeros)
        slot1 = _read_slot(row, 1, slots, at, inside, zeros)
        slot2 = _read_slot(row, 2, slots, at, inside, zeros)
    if gradient is not None:
        g = _read(row, _OF_G, gradient, at, inside, zeros)
    z = zeros
    if noise is not None:
        z = _read(row, _OF_Z, noise, at, inside, zeros)
    else:
        if _uses(row, _OF_Z):
            z = normals(first, s, number, draw, stream, QUADS)
    drawn, log_sigma = z, zeros
    if len(variance) > 0:  # noqa: SIM102 (decided when compiled; the next when run)
        if _uses(row, _OF_Z):
            v = load(variance, b, first, lane, inside, WIDE)
            log_sigma = _learned_log_sigma(v, tl.load(row + _LOG_MIN), tl.load(row + _LOG_MAX))
            z = z * _exp_in_range(log_sigma)
    if deviance is not None:  # noqa: SIM102
        if _uses(row, _OF_Z):
            # A program of fewer elements than a block is a whole sample: the rest of its block would add zeros.
            WIDTH: tl.constexpr = min(_BLOCK, 4 * QUADS)
            BLOCKS: tl.constexpr = 4 * QUADS // WIDTH
            terms = tl.where(inside, drawn * drawn + (log_sigma + log_sigma), 0.0)
            blocks = (tl.cast(n, tl.int64) + (_BLOCK - 1)) // _BLOCK
            block = first // _BLOCK + tl.arange(0, BLOCKS)
            sums = deviance + index * deviance_row + b * blocks
            tl.store(sums + block, _block_sums(terms, BLOCKS, WIDTH), mask=block < blocks)

    # What it writes.
    bound, scale = tl.load(row + _CLIP), tl.load(row + _SCALE)
    if clip is not None:
        bound, scale = tl.load(clip + 2 * b), tl.load(clip + 2 * b + 1)
    x0 = _predict_x0(x_in, m, tl.load(row + _P), tl.load(row + _Q), bound, scale)
    terms = (x_in, anchor_in, x0, m, slot0, slot1, slot2, z, g)
    if x0_out is not None:
        tl.store(x0_out + at, x0, mask=inside)
    if anchor_out is not None:  # noqa: SIM102
        if tl.load(row + _KEEPS_ANCHOR) != 0:
            tl.store(anchor_out + at, _combine(row, _ANCHOR, terms, zeros), mask=inside)
    for i in tl.static_range(len(slots_out)):
        if tl.load(row + _WRITE) == slots_out[i][1]:
            tl.store(slots_out[i][0] + at, _combine(row, _SLOT, terms, zeros), mask=inside)
    following = _combine(row, _X, terms, zeros)
    if mask is not None:
        known_z = zeros
        sigma = tl.load(row + _KNOWN_SIGMA)
        if sigma != 0:
            if known_noise is not None:
                known_z = tl.load(known_noise + at, mask=inside)
            else:
                known_z = normals(first, s, number, draw, _KNOWN, QUADS)
        image = tl.load(known + at, mask=inside) * tl.load(row + _KNOWN_ALPHA) + known_z * sigma
        weight = tl.load(mask + at, mask=inside)
        following = weight * image + (1.0 - weight) * following
    if x_out is not None:
        tl.store(x_out + at, following, mask=inside)
    if len(model_input) > 0:
        store(model_input, b, first, lane, inside, following * tl.load(row + _NEXT_C_IN), WIDE)


def _numbered(slots: list[Tensor | None]) -> tuple:
    return tuple((slot, number) for number, slot in enumerate(slots) if slot is not None)


class Update:
    """An update whose tensors were checked once: call it with a row (an int, or an int64 tensor [1] on the device)."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.slots, self.slots_out = _numbered(operands.slots), _numbered(operands.slots_out)
        self.model_input, self.key = view(operands.model_input), key_arguments(operands.key)
        self.set_outputs(operands.outputs, operands.variance)

    def set_state(self, x: Tensor, x_out: Tensor) -> None:
        """Name the state to read and the one to write, for a caller whose state moves between rows."""
        self.operands.x, self.operands.x_out = x, x_out

    def set_outputs(self, outputs: tuple[Tensor, ...], variance: Tensor | None = None) -> None:
        """Name the network's outputs, where they are not at the addresses of the last call."""
        self.operands.outputs, self.operands.variance = outputs, variance
        self.outputs, self.variance = tuple(view(output) for output in outputs), view(variance)

    def set_noise(self, noise: Tensor | None, known_noise: Tensor | None = None) -> None:
        """Name the noise to use in place of the stream's."""
        self.operands.noise, self.operands.known_noise = noise, known_noise

    def set_results(self, x0_out: Tensor | None, anchor_out: Tensor | None) -> None:
        """Name where x̂_0 and anchor' go, for a caller who wants new tensors of them."""
        self.operands.x0_out, self.operands.anchor_out = x0_out, anchor_out

    def __call__(self, row: int | Tensor) -> None:
        o = self.operands
        if o.x.numel() == 0:
            return
        index, step = (0, row) if isinstance(row, Tensor) else (row, None)
        launch(
            update_kernel, o.x, o.table, index, step, self.outputs, self.variance, o.x, o.anchor, self.slots,
            o.noise, o.gain, o.clip, o.gradient, o.mask, o.known, o.known_noise, o.x_out, o.anchor_out,
            self.slots_out, o.x0_out, self.model_input, o.nonfinite, o.deviance,
            0 if o.deviance is None else o.deviance.stride(0), *self.key,
        )  # fmt: skip
