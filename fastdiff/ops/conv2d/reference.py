"""conv2d in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.conv2d.geometry import Geometry


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    inputs: Sequence[Tensor] = (),
    pointwise: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    wide: torch.dtype | None = None,
) -> Tensor:
    """conv2d(x, weight, bias) + Σ conv2d(inputs[i], pointwise[i]) + residual, in the dtype ``wide``.

    By default that is float32, or float64 where x is: the oracle.
    """
    wide = torch.promote_types(x.dtype, torch.float32) if wide is None else wide
    x, weight = x.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if geometry.upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    padding = geometry.symmetric
    if padding is None:
        x, padding = F.pad(x, (*geometry.padding[1], *geometry.padding[0])), (0, 0)
    y = F.conv2d(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)
    for image, w in zip(inputs, pointwise, strict=True):
        y = y + F.conv2d(image.to(wide), w.to(wide))
    return y if residual is None else y + residual.to(wide)
