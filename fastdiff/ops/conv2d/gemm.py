"""conv2d as one Triton kernel on a GPU: the convolution, the pointwise ones and the residual, in one pass.

``pack`` lays weights out once, gemm_triton.py computes; choice.json says where that was faster than the library's
convolution and a pass after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops.conv2d.geometry import Geometry
from fastdiff.ops.conv2d.phases import presum
from fastdiff.ops.packed import bias_of

STEP = 64  # channels that the kernel multiplies at a time


def pack(weight: Tensor, pointwise: Sequence[Tensor], geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """[phases, N, K]: the weights, without gradients, in ``dtype`` and the kernel's order.

    Of a doubled image they are four windows of 2×2 on the small grid (phases.py), summed in float32.

    Raises:
        ValueError: for weights or a geometry that the kernel does not compute.
    """
    _check(weight, pointwise, geometry)
    if geometry.upsample:
        summed = presum(weight.detach().float())  # [C, N, 4, 4]
        taps = ((3, 1), (2, 0))
        windows = [summed[:, :, taps[a]][:, :, :, taps[b]] for a in (0, 1) for b in (0, 1)]
        main = torch.stack([w.permute(1, 2, 3, 0).flatten(1) for w in windows])
    else:
        main = weight.detach().permute(0, 2, 3, 1).flatten(1)[None]
    points = [w.detach().flatten(1)[None] for w in pointwise]
    return torch.cat([w.to(dtype) for w in (main, *points)], 2).contiguous()


def bind(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, inputs: Sequence[Tensor],
    pointwise: Sequence[Tensor], residual: Tensor | None, packed: dict[Any, Any],
) -> Callable[..., Tensor]:  # fmt: skip
    """call(x, residual=None, inputs=()) for images of these layouts; arguments as for ``conv2d.bind``."""
    stride, low, upsample = geometry.stride[0], geometry.padding[0][0], geometry.upsample
    key = "gemm", x.dtype, upsample, tuple(w.shape[1] for w in pointwise)
    if key not in packed:
        packed[key] = pack(weight, pointwise, geometry, x.dtype)
    weights, side = packed[key], 2 if upsample else weight.shape[2]
    offset = bias_of(packed, bias, torch.float32)
    shape = (x.shape[0], len(weight), *geometry.size(x, weight))
    dtype, device = x.dtype, x.device

    def call(x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> Tensor:
        from fastdiff.ops.conv2d import gemm_triton

        out = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        other = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
        images = tuple(map(_aligned, inputs))
        counters = gemm_triton.counters(device)
        gemm_triton.conv(out, _aligned(x), images, weights, offset, other, side, stride, low, upsample, counters)
        return out

    return call


def _aligned(image: Tensor) -> Tensor:
    """A dense channels_last image whose pixels can be read 16 bytes at a time: itself, or a copy."""
    image = image.contiguous(memory_format=torch.channels_last)
    return image if image.data_ptr() % 16 == 0 else image.clone()


def computes(weight: Tensor, geometry: Geometry, pointwise: Sequence[Tensor] = ()) -> bool:
    """Whether the kernel computes a convolution with such weights."""
    try:
        _check(weight, pointwise, geometry)
    except ValueError:
        return False
    return True


def _check(weight: Tensor, pointwise: Sequence[Tensor], geometry: Geometry) -> None:
    stride, upsample = geometry.stride[0], geometry.upsample
    if weight.ndim != 4 or weight.shape[2:] not in ((1, 1), (3, 3)) or weight.shape[1] % STEP or not len(weight):
        raise ValueError(
            f"weight must be [N, C, 3, 3] or [N, C, 1, 1], C a multiple of {STEP}; got {list(weight.shape)}"
        )
    if not geometry.square:
        raise ValueError(f"stride and padding must be those of rows and columns alike, without groups; got {geometry}")
    if upsample and (geometry.padding != ((1, 1), (1, 1)) or weight.shape[2] != 3 or pointwise):
        raise ValueError(f"an up-sampling window must be 3×3, padded by 1, and alone; got {geometry}")
    if stride not in (1, 2) or (upsample and stride != 1):
        raise ValueError(f"stride must be 1 or 2, and 1 for an up-sampling window; got {stride}")
    if len(pointwise) > 2:
        raise ValueError(f"there may be two pointwise inputs; got {len(pointwise)}")
    for w in pointwise:
        if w.ndim != 4 or w.shape[2:] != (1, 1) or w.shape[1] % STEP or len(w) != len(weight):
            raise ValueError(
                f"pointwise weights must be [{len(weight)}, C, 1, 1], C a multiple of {STEP}; got {list(w.shape)}"
            )
