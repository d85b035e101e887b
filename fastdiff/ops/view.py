"""How a kernel sees a tensor: [B, n] with at most two strides inside a sample."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Strides(NamedTuple):
    """Element e of sample b lies at b·batch + (e // inner)·outer + (e % inner)·step, in elements."""

    batch: int
    inner: int
    outer: int
    step: int


def strides_of(tensor: Tensor) -> Strides | None:
    """The strides of a [B, …] tensor, or None where a sample needs more than two.

    Contiguous and channels_last tensors, and their slices along samples and channels, have such strides.
    """
    shape = tensor.shape
    n = tensor.numel() // shape[0] if shape[0] else 1
    if tensor.is_contiguous():
        return Strides(n, max(n, 1), 0, 1)
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape[1:], tensor.stride()[1:], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    batch = tensor.stride(0)
    if len(merged) <= 1:
        return Strides(batch, max(n, 1), 0, merged[0][1] if merged else 1)
    if len(merged) == 2:
        return Strides(batch, merged[1][0], merged[0][1], merged[1][1])
    return None


def viewable(tensor: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy where a kernel cannot see it."""
    return tensor if tensor.is_contiguous() or strides_of(tensor) is not None else tensor.contiguous()


def overlaps(tensor: Tensor) -> bool:
    """Whether elements of a tensor may share memory: exact where each dimension's stride passes all smaller ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
