"""One sample of a batch by itself, so that what a library computes of it cannot depend on the others.

A library chooses tiles, splits and vector tails by the shapes, strides and addresses that it is given: a matrix product
of 8 rows may add in another order than one of 1, and of 8 rows the last may be added otherwise than the first. A sample
that was copied to memory of its own is seen with the same shape, strides and alignment in every batch and at every
place in it; a library that gives the same bits for the same call then gives the sample's in all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alone(batch: Tensor, i: int, rows: int = 1) -> Tensor:
    """Sample i of [B, …], its ``rows`` rows from i · rows on, as a copy [rows, …] in memory of its own, which torch
    aligns: channels_last where the sample is, else contiguous.
    """
    one = batch[i * rows : (i + 1) * rows]
    return torch.empty(one.shape, dtype=one.dtype, device=one.device, memory_format=format_of(one)).copy_(one)


def format_of(sample: Tensor) -> torch.memory_format:
    """The memory format of a sample [1, …], in which the stride from sample to sample takes no part."""
    last = sample.ndim == 4 and not sample.is_contiguous() and sample.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
