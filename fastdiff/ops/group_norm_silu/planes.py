"""How the kernels see a [B, C, …] tensor: channels, and pixels at one stride."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Planes(NamedTuple):
    """Pixel p of channel c of sample b lies at b·batch + c·channel + p·pixel, in elements."""

    batch: int
    channel: int
    pixel: int


def memory_format(x: Tensor) -> torch.memory_format:
    """That of the result: channels_last where x [B, C, H, W] is, or is a slice of such a tensor; else contiguous."""
    if x.ndim != 4 or x.is_contiguous():
        return torch.contiguous_format
    last = x.is_contiguous(memory_format=torch.channels_last) or (x.stride(1) == 1 and x.shape[1] > 1)
    return torch.channels_last if last else torch.contiguous_format


def planes(tensor: Tensor, last: bool) -> Planes | None:
    """A tensor's strides where its channels (``last``) or else its pixels are dense; None where they are not."""
    shape, strides = tensor.shape, tensor.stride()
    count, pixel = 1, 0
    for size, stride in zip(shape[:1:-1], strides[:1:-1], strict=True):
        if size == 1:
            continue
        if count == 1:
            pixel = stride
        elif stride != count * pixel:
            return None
        count *= size
    if last:
        return Planes(strides[0], 1, pixel) if strides[1] == 1 or shape[1] == 1 else None
    return Planes(strides[0], strides[1], 1) if pixel == 1 or count == 1 else None


def walkable(tensor: Tensor, last: bool, format: torch.memory_format) -> Tensor:
    """The tensor itself, or a copy in a format that the kernels can walk."""
    return tensor if planes(tensor, last) is not None else tensor.contiguous(memory_format=format)


def dense_channels(add: Tensor | None) -> Tensor | None:
    """[C], [1, C] or [B, C] whose channels lie side by side: the tensor itself or a copy."""
    if add is None:
        return None
    return add if add.stride(-1) == 1 or add.shape[-1] == 1 else add.contiguous()
