"""One row of a plan in plain PyTorch: the formula of fastdiff/plan/row.py, in the order of csrc/common/row.h.

With a float32 state every backend gives these bits (each operation is eager, so nothing is fused); with a float64 state
it is the oracle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.noise import KNOWN, NoiseKey
from fastdiff.ops.randn.reference import randn
from fastdiff.ops.update.deviance import block_sums
from fastdiff.ops.update.operands import Operands
from fastdiff.plan.plan import COLUMNS, TERMS

_AT = {name: i for i, name in enumerate(COLUMNS)}
_OF_Z = [_AT[f"{output}.z"] for output in ("x", "anchor", "slot")]
_LOGS = [_AT["log_min"], _AT["log_max"]]


class Inputs(NamedTuple):
    """What a row reads: [B, …] tensors in the state's dtype, but for the outputs, which have the network's."""

    x: Tensor
    outputs: tuple[Tensor, ...] = ()
    variance: Tensor | None = None  # the network's second half of channels
    anchor: Tensor | None = None
    slots: tuple[Tensor | None, ...] = (None, None, None, None)
    z: Tensor | None = None
    gain: Tensor | None = None  # [B]
    clip: Tensor | None = None  # [B, 2]: bound and scale
    gradient: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    known_z: Tensor | None = None


class Outputs(NamedTuple):
    """What a row writes, in the state's dtype; None where it does not."""

    x: Tensor
    anchor: Tensor | None
    slot: Tensor | None
    x0: Tensor
    model_input: Tensor
    m: Tensor | None  # the guided output before the gain, whose finiteness is checked


def update(row: Tensor, i: Inputs) -> Outputs:
    """Apply one row of a table ([48], float64, on the CPU) to the state.

    Where the row requires a gradient, its coefficients of 0 have one, too, if the term is at hand; adding 0 times a
    finite term changes no bit.
    """
    dtype = i.x.dtype
    # Rounded once to the state's precision: what the device's table holds.
    values = row.detach().to(dtype).tolist()
    numbers = row.to(i.x.device, dtype).unbind() if row.requires_grad else values

    def col(name: str) -> Any:
        """A number of the row: a float, or a tensor [] through which its gradient flows."""
        return numbers[_AT[name]]

    def fixed(name: str) -> float:
        """The same as a float."""
        return values[_AT[name]]

    m = guided = None
    if i.outputs:
        m = i.outputs[0].to(dtype)
        if len(i.outputs) > 1:
            m = m * col("w0")
            for k, output in enumerate(i.outputs[1:], start=1):
                m = m + output.to(dtype) * col(f"w{k}")
        guided = m
        if i.gain is not None:
            m = m * _per_sample(i.gain, m)
    x0 = i.x * col("p")
    x0 = x0 + (torch.zeros_like(x0) if m is None else m) * col("q")
    if i.clip is None:
        bound, scale = col("clip"), col("scale")
    else:
        bound, scale = _per_sample(i.clip[:, 0], x0), _per_sample(i.clip[:, 1], x0)
    x0 = torch.where(bound < x0, bound, x0)
    x0 = torch.where(x0 < -bound, -bound, x0)
    x0 = x0 * scale

    z = i.z
    if i.variance is not None and z is not None:
        z = z * learned_sigma(i.variance.to(dtype), col("log_min"), col("log_max"))
    slots = [i.slots[int(fixed(f"read{k}"))] if fixed(f"read{k}") >= 0 else None for k in range(3)]
    terms = dict(zip(TERMS, (i.x, i.anchor, x0, m, *slots, z, i.gradient), strict=True))

    def combine(output: str) -> Tensor:
        total = torch.zeros_like(i.x)
        for name in TERMS:
            term = terms[name]
            if fixed(f"{output}.{name}") != 0 or (row.requires_grad and term is not None):
                assert term is not None, f"the row reads {name}"
                total = total + term * col(f"{output}.{name}")
        return total

    x = combine("x")
    anchor = combine("anchor") if fixed("keeps_anchor") else None
    slot = combine("slot") if fixed("write") >= 0 else None
    if i.mask is not None:
        assert i.known is not None
        known = i.known * col("known_alpha")
        known_z = i.known_z if fixed("known_sigma") else None  # unread where its coefficient is 0
        known = known + (torch.zeros_like(known) if known_z is None else known_z) * col("known_sigma")
        x = i.mask * known + (1.0 - i.mask) * x
    return Outputs(x, anchor, slot, x0, x * col("next_c_in"), guided)


def learned_sigma(v: Tensor, log_min: float | Tensor, log_max: float | Tensor) -> Tensor:
    """σ under learned variance, like v: exp(``learned_log_sigma``)."""
    y = learned_log_sigma(v, log_min, log_max)
    # The polynomial's bit tricks have no gradient.
    return y.exp() if v.dtype == torch.float64 or y.requires_grad else exp_in_range(y)


def learned_log_sigma(v: Tensor, log_min: float | Tensor, log_max: float | Tensor) -> Tensor:
    """½(f·log_max + (1 − f)·log_min), f = (v + 1)/2, clamped to ±87 (float32's range)."""
    f = (v + 1.0) * 0.5
    y = (f * log_max + (1.0 - f) * log_min) * 0.5
    y = torch.where(y > 87.0, 87.0, y)
    return torch.where(y < -87.0, -87.0, y)


def exp_in_range(y: Tensor) -> Tensor:
    """exp(y) of float32 |y| ≤ 87 by the polynomial of csrc/common/row.h, operation by operation."""
    shifted = y * 1.44269504 + 12582912.0
    k = shifted - 12582912.0
    r = (y - k * 0.693359375) - k * -2.12194440e-4
    e = r * 1.9875691500e-4 + 1.3981999507e-3
    e = e * r + 8.3334519073e-3
    e = e * r + 4.1665795894e-2
    e = e * r + 1.6666665459e-1
    e = e * r + 5.0000001201e-1
    e = e * (r * r) + r + 1.0
    return e * ((shifted.view(torch.int32) << 23) + 0x3F800000).view(torch.float32)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def drawn(
    row: Tensor, x: Tensor, key: NoiseKey, noise: Tensor | None, known_noise: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(z, z_known) of a row: as given, or drawn where the row uses them."""
    values = dict(zip(COLUMNS, row.tolist(), strict=True))
    if noise is None and uses_z(row):
        noise = _draw(x, key, int(values["draw"]), int(values["stream"]))
    if known_noise is None and mask is not None and values["known_sigma"]:
        known_noise = _draw(x, key, int(values["draw"]), KNOWN)
    return noise, known_noise


def uses_z(row: Tensor) -> bool:
    """Whether a row of a table has a coefficient of z that is not 0."""
    return any(row[_OF_Z].tolist())


def _draw(x: Tensor, key: NoiseKey, draw: int, stream: int) -> Tensor:
    return randn(tuple(x.shape), *key.lists(len(x)), draw, stream, x.device).to(x.dtype)


class Update:
    """An update whose tensors were checked once: call it with a row (an int, or an int64 tensor [1])."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands

    def set_state(self, x: Tensor, x_out: Tensor) -> None:
        """Name the state to read and the one to write, for a caller whose state moves between rows."""
        self.operands.x, self.operands.x_out = x, x_out

    def set_outputs(self, outputs: tuple[Tensor, ...], variance: Tensor | None = None) -> None:
        self.operands.outputs, self.operands.variance = outputs, variance

    def set_noise(self, noise: Tensor | None, known_noise: Tensor | None = None) -> None:
        self.operands.noise, self.operands.known_noise = noise, known_noise

    def set_results(self, x0_out: Tensor | None, anchor_out: Tensor | None) -> None:
        """Name where x̂_0 and anchor' go, for a caller who wants new tensors of them."""
        self.operands.x0_out, self.operands.anchor_out = x0_out, anchor_out

    def __call__(self, row: int | Tensor) -> None:
        o, index = self.operands, int(row)
        assert o.host_table is not None
        values = o.host_table[index]
        z, known_z = drawn(values, o.x, o.key, o.noise, o.known_noise, o.mask)
        out = update(
            values,
            Inputs(o.x, o.outputs, o.variance, o.anchor, tuple(o.slots), z, o.gain, o.clip, o.gradient, o.mask,
                   o.known, known_z),
        )  # fmt: skip
        targets = [(o.x_out, out.x), (o.anchor_out, out.anchor), (o.x0_out, out.x0), (o.model_input, out.model_input)]
        if out.slot is not None:
            targets.append((o.slots_out[int(values[COLUMNS.index("write")])], out.slot))
        for target, value in targets:
            if target is not None and value is not None:
                target.copy_(value)
        if o.deviance is not None and z is not None and uses_z(values):
            deviance = z * z
            if o.variance is not None:
                y = learned_log_sigma(o.variance.to(z.dtype), *values[_LOGS].to(z.dtype).tolist())
                deviance = deviance + (y + y)
            o.deviance[index] = block_sums(deviance.flatten(1))
        if o.nonfinite is not None and out.m is not None and not bool(out.m.isfinite().all()):
            o.nonfinite.clamp_(max=index)
