"""The log-density of what a row draws, from the noise that it drew: log p(x' | x) = −½ (Σ (z² + ln σ²) + N ln 2πc²).

x' = mean + c·σ·z with the row's coefficient c of z, and σ = 1 but under learned variance. N counts a sample's elements.
The update's kernels add up z² + ln σ² over each block of ``BLOCK`` elements; here the blocks are added, in float64. All
sums are the same tree: element i takes element i + half, half is halved, and what lies beyond the end is 0. Elementwise
operations alone do it, so that the bits are those of any backend, device, batch and number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 1024  # kDevianceBlock of csrc/fastdiff.h


def blocks(elements: int) -> int:
    """How many blocks a sample of so many elements has."""
    return -(-elements // BLOCK)


def block_sums(deviance: Tensor) -> Tensor:
    """The sums over blocks [B, blocks] of the elements' z² + ln σ² [B, n]."""
    count = blocks(deviance.shape[1])
    filled = pad(deviance, (0, count * BLOCK - deviance.shape[1]))
    return tree_sum(filled.view(len(deviance), count, BLOCK))


def tree_sum(values: Tensor) -> Tensor:
    """The sum over the last dimension, in the order above."""
    width = 1 << max(values.shape[-1] - 1, 0).bit_length()
    values = pad(values, (0, width - values.shape[-1]))
    while width > 1:
        width //= 2
        values = values[..., :width] + values[..., width:]
    return values[..., 0]


def constant(coefficient: float, elements: int) -> float:
    """N ln 2πc²: the deviance that x' has whatever was drawn."""
    return elements * (math.log(2 * math.pi) + 2 * math.log(abs(coefficient)))


def log_probs(sums: Tensor, coefficients: Sequence[float], elements: int) -> Tensor:
    """float32 [rows, B] of the blocks' sums [rows, B, blocks] and each row's c; 0 where c is 0 and nothing is drawn."""
    constants = [constant(c, elements) if c else 0.0 for c in coefficients]
    fixed = torch.tensor(constants, dtype=torch.float64, device="cpu").to(sums.device)[:, None]
    return ((tree_sum(sums.to(torch.float64)) + fixed) * -0.5 + 0.0).to(torch.float32)  # + 0.0: no −0
