"""A 3×3 convolution with fewer multiplications: Winograd's F(2×2, 3×3) (Lavin & Gray 2016, arXiv:1509.09308).

Four results, 2×2, of 16 products instead of 36; of 9, where the image is first doubled by its nearest neighbours. Equal
in exact arithmetic; in floating point the transformed weights and images are rounded, and the sums of products have 2.8
times the result's variance. The kernel adds up channels in blocks, so that its root-mean-square error in float32 stays
at 2.4e-7 to 3.5e-7 of the result's standard deviation up to 1280 channels: between a quarter and 1.5 times that of
PyTorch's convolution, whose own depends on the CPU and the shape (tests/ops/test_conv2d_winograd.py derives the bound).
In bfloat16, whose transformed numbers are rounded before they are multiplied, one convolution has 1.8 times the
library's error with float32 weights and 2.5 times with weights that are bfloat16 themselves; whole networks stay at 0.8
to 1.1 times that of PyTorch's bfloat16. A number that is not finite spreads to the 4×4 window of
its tile, not the 3×3 one.

tests/ops/test_conv2d_winograd.py compares it with the definition in float64. ``pack`` orders weights once for
csrc/cpu/winograd_conv.cpp, which native_impl.py calls; choice.json says where that is faster than oneDNN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops import native

PANEL = 32  # features that the kernel computes at a time, as csrc/cpu/winograd_conv.cpp has them
WORDS = 16  # of 4 bytes, of channels that it reads at a time
# One dimension: a window's three weights at the four points where they are multiplied.
WEIGHT = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
DOUBLED = (0, 1, 3)  # the products that are not zero where the two inner pixels are the same


def pack(weight: Tensor, *, upsample: bool = False, dtype: torch.dtype) -> Tensor:
    """Weights [N, C, 3, 3] that ``computes`` accepts, for images of ``dtype``, doubled first if ``upsample``.

    Returns:
        Where this CPU multiplies bfloat16 and the images are, transformed and rounded once, in pairs of channels:
        [panels, points, 2, C / 2, 16, 2], 0.89 times the bytes of float32 parameters, 0.5 where ``upsample``. Else the
        weights themselves in float32, [panels, C, 9, 32], as many bytes, which the kernel transforms as it reads them.
    """
    panels = (0, 0, 0, 0, 0, 0, 0, -len(weight) % PANEL)  # the last one is filled with zeros
    if not _pairs(dtype):
        wide = F.pad(weight.detach().to(torch.float32), panels)
        return wide.flatten(2).unflatten(0, (-1, PANEL)).permute(0, 2, 3, 1).contiguous()  # of [panels, 32, C, 9]
    transform = torch.tensor(WEIGHT, dtype=torch.float64, device=weight.device)
    points = transform @ F.pad(weight.detach().double(), panels) @ transform.T
    points = points.movedim(1, -1).flatten(1, 2)  # of [N, C, 4, 4]
    if upsample:
        points = points[:, [4 * i + j for i in DOUBLED for j in DOUBLED]]
    points = points.to(torch.bfloat16).unflatten(0, (-1, 2, PANEL // 2)).unflatten(4, (-1, 2))
    return points.permute(0, 3, 1, 4, 2, 5).contiguous()  # of [panels, 2, 16, points, C / 2, 2]


def computes(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel computes a convolution with such weights, of images of ``dtype``."""
    if weight.ndim != 4 or weight.device.type != "cpu" or dtype not in native.DTYPES or weight.numel() == 0:
        return False
    return weight.shape[2:] == (3, 3) and weight.shape[0] % WORDS == 0 and weight.shape[1] % _step(dtype) == 0


def _pairs(dtype: torch.dtype) -> bool:
    """Whether products of bfloat16 serve images of ``dtype`` on this CPU."""
    return dtype == torch.bfloat16 and bool(native.bfloat16())


def _step(dtype: torch.dtype) -> int:
    return WORDS * (2 if _pairs(dtype) else 1)
