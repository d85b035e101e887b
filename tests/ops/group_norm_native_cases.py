"""What the CUDA kernel of group_norm_silu is tried on, on the CPU by emulation and on a GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import torch
from group_norm_terms import assert_right
from torch import Tensor

from fastdiff.ops.group_norm_silu import group_norm_silu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# channels, channels of x2, groups: of 4, 8, 10, 12, 16 and 40 a group, straddling the border, one group, few channels
CHANNELS = (
    (128, 0, 32), (256, 0, 32), (256, 128, 32), (512, 0, 32), (320, 0, 32), (640, 0, 32), (40, 0, 4), (24, 16, 4),
    (8, 0, 1), (64, 192, 2), (16, 0, 8), (1280, 0, 32), (48, 0, 3),
)  # fmt: skip
GROUPS, WARPS, VECS = (1, 2, 3, 4, 8, 16, 32), (1, 3, 8, 16), (1, 2, 4, 8)


def check(x: Tensor, weight, bias, groups: int, *, backend: str = "native", **options) -> Tensor:
    """The native result, compared with float64."""
    got = group_norm_silu(x, weight, bias, groups, **options, backend=backend)
    assert_right(got, x, weight, bias, groups, **options)
    return got


def image(batch: int, channels: int, pixels: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    x = torch.randn(batch, channels, *pixels, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def random_call(rng: random.Random, channels, batch: int, pixels, dtype: torch.dtype, device: str) -> dict:
    """Arguments of ``check``: x2 where the case has it, and any of the optional tensors, of either dtype."""
    first, second, groups = channels
    c = first + second

    def vector(*shape: int) -> Tensor | None:
        kind = rng.choice([None, torch.float32, dtype])
        return None if kind is None else torch.randn(*shape, device=device).to(kind)

    return {
        "x": image(batch, first, pixels, dtype, device), "groups": groups, "weight": vector(c), "bias": vector(c),
        "x2": image(batch, second, pixels, dtype, device) if second else None, "silu": rng.random() < 0.7,
        "add": rng.choice([vector(c), vector(1, c), vector(batch, c)]),
    }  # fmt: skip


def blocks() -> Iterator[tuple[int, int, int]]:
    """Groups, warps and vectors to force; not all are legal for every call."""
    return itertools.product(GROUPS, WARPS, VECS)
