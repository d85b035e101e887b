"""The convolution kernel for triton_aot.py: every kind, at sizes that take each of its tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch

from fastdiff.ops.conv2d.gemm_triton import conv

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# side, stride, low, up, pointwise inputs
KINDS = {
    "3x3": (3, 1, 1, False, 0),
    "shortcut": (3, 1, 1, False, 2),
    "1x1": (1, 1, 0, False, 0),
    "down": (3, 2, 0, False, 0),
    "up": (2, 1, 1, True, 0),
}
PIXELS = {"large": (64, 32), "middle": (64, 8), "small": (1, 16), "smallest": (1, 4)}  # batch and side


def run(dtype: torch.dtype, kind: str, pixels: str) -> None:
    side, stride, low, up, points = KINDS[kind]
    batch, size = PIXELS[pixels]
    size = size // 2 if up else size

    def image(channels: int, size: int) -> torch.Tensor:
        return torch.empty(batch, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)

    phases, K = (4 if up else 1), side * side * 128 + points * 256
    weights, bias = torch.empty(phases, 256, K, dtype=dtype), torch.empty(256)
    out = image(256, 2 * size if up else size)
    inputs = tuple(image(256, size) for _ in range(points))
    conv(out, image(128, size * stride), inputs, weights, bias, None if points else out, side, stride, low, up, None)


def variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """The whole matrix."""
    for (name, dtype), kind, pixels in product(DTYPES.items(), KINDS, PIXELS):
        yield f"conv {name} {kind} {pixels}", lambda d=dtype, k=kind, p=pixels: run(d, k, p)


ONE_EACH = ("conv bf16 shortcut small", "conv f16 up large")
