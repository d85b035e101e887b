"""How the kernels walk memory: in rows, whose elements lie side by side in the output.

A channels_last output has a row for each position, whose elements are the channels; any other has a row for each
channel, whose elements are the positions. The other tensors are walked in that order at strides of their own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Strides(NamedTuple):
    """Channel c at position s (row-major) of sample b lies at b·batch + c·channel + s·position, in elements."""

    batch: int
    channel: int
    position: int


class Walk(NamedTuple):
    """``rows`` rows of ``length`` elements in each sample."""

    channels_last: bool
    rows: int
    length: int


def strides_of(tensor: Tensor) -> Strides | None:
    """The strides of a [B, C, …] tensor, or None where its positions need more than one."""
    position, expected = 1, None
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size == 1:
            continue
        if expected is None:
            position = stride
        elif stride != expected:
            return None
        expected = size * stride
    return Strides(tensor.stride(0), tensor.stride(1), position)


def walkable(tensor: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy where its positions need more than one stride."""
    return tensor if tensor.is_contiguous() or strides_of(tensor) is not None else tensor.contiguous()


def walk_of(out: Tensor) -> Walk:
    """The order in which ``out``, walkable and not empty, is written."""
    batch, channels = out.shape[:2]
    positions = out.numel() // (batch * channels)
    if channels > 1 and out.stride(1) == 1:
        return Walk(True, positions, channels)
    return Walk(False, channels, positions)


def row_strides(tensor: Tensor, walk: Walk) -> tuple[int, int, int]:
    """The strides of samples, of rows, and of a row's elements."""
    strides = strides_of(tensor)
    assert strides is not None
    if walk.channels_last:
        return strides.batch, strides.position, strides.channel
    return strides.batch, strides.channel, strides.position
