"""Nearest-neighbour doubling and a 3×3 convolution as one transposed convolution of the small grid.

Each pixel of the large grid reads 3×3 neighbours of which only 2×2 differ, so four 2×2 convolutions with weights summed
beforehand give the same result in 4/9 of the operations: in one dimension [w0, w1 + w2] for the even pixels and
[w0 + w1, w2] for the odd ones. Together they are a transposed convolution of stride 2 with the kernel
[w2, w1 + w2, w0 + w1, w0], which every convolution library has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.randn import DTYPES


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1).

    Equal in exact arithmetic; in float32 within 1e-5 of the largest value, since the weights' sums are rounded.

    Args:
        x: [B, C, H, W] of float32, bfloat16 or float16, of any strides.
        weight: [O, C, 3, 3] of x's dtype.
        bias: [O] of x's dtype, or None.
        exact: take the two steps as they are written.

    Returns:
        [B, O, 2·H, 2·W], in the memory format that the convolution gives. Gradients flow to all three.

    Raises:
        TypeError: for what is no tensor, or of another dtype.
        ValueError: for shapes or devices that do not fit.
    """
    _check(x, weight, bias)
    if exact:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    return F.conv_transpose2d(x, presum(weight), bias, stride=2, padding=1)


def presum(weight: Tensor) -> Tensor:
    """The kernel [C, O, 4, 4] of the transposed convolution, for a 3×3 one of [O, C, 3, 3]: summed in float32."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for dim in (2, 3):
        a, b, c = wide.unbind(dim)
        wide = torch.stack([c, b + c, a + b, a], dim)
    return wide.transpose(0, 1).to(weight.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16; got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"x must have shape [B, C, H, W]; got {list(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}; got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {tensor.device}")
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"weight must have shape [O, {x.shape[1]}, 3, 3]; got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{len(weight)}]; got {list(bias.shape)}")
