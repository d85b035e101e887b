"""Linear layers whose weights stay the same, in the form in which this device multiplies them soonest.

There is nothing to fuse, so this is no operation of its own: ``bind`` alone is here, for the networks' projections and
for convolutions of one pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.backend import chip_of
from fastdiff.ops.packed import bias_of, blocks, onednn, without_autocast

Call = Callable[..., Tensor]

# Products of one call up to which MKL's matrix product of float32 (weights [K, N]) was as fast as oneDNN's of blocked
# weights, which takes 50 µs before it begins.
FEW = 1 << 24


def packing_pays(device: torch.device) -> bool:
    """Whether oneDNN's product of blocked float32 weights was faster than torch's own call, MKL's, on such a device.

    With AVX-512 transformers' projections took two thirds of the time; with AVX2 the two differ by less than the noise.
    """
    return chip_of(device) == "avx512"


def bind(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    packed: dict[Any, Any] | None = None,
) -> Call:
    """``F.linear(x, weight, bias)``, plus a residual that a call may name, for one layout, without gradients.

    Args:
        x: an example [..., K]; every call's must have its shape, dtype and device.
        weight: [N, K] of any floating dtype, used in x's.
        bias: [N], likewise, or None.
        packed: the layer's derived weights, looked up and added to: to be cleared when weight or bias change.

    Returns:
        call(x, residual=None) -> [..., N], the residual likewise. It checks nothing and may be shared by threads.

    Raises:
        RuntimeError: in torch's words, if x and weight differ in K.
    """
    packed = {} if packed is None else packed
    return without_autocast(unguarded(x, weight, bias, packed), x.device)


def unguarded(x: Tensor, weight: Tensor, bias: Tensor | None, packed: dict[Any, Any]) -> Call:
    """``bind`` for callers who see to autocast themselves."""
    dtype, features = x.dtype, len(weight)
    shape, width = (*x.shape[:-1], features), x.shape[-1]
    rows = x.numel() // max(width, 1)
    if width != weight.shape[1]:  # oneDNN, which binds below, would only say that it has no such product
        shapes = f"{rows}x{width} and {weight.shape[1]}x{features}"
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({shapes})")
    offset = bias_of(packed, bias, dtype)
    kept = "linear", dtype
    if x.device.type == "cpu" and dtype == torch.float32 and rows * width * features <= FEW:
        if kept not in packed:
            packed[kept] = weight.detach().to(dtype).t().contiguous()
        transposed = packed[kept]

        def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
            flat = x.reshape(rows, width)
            y = torch.mm(flat, transposed) if offset is None else torch.addmm(offset, flat, transposed)
            y = y.view(shape)
            return y if residual is None else y.add_(residual)

        return product
    if onednn(x):
        dense = weight.detach().to(dtype).contiguous()
        blocked = blocks(packed, kept, torch.ops.mkldnn._reorder_linear_weight(dense, rows))
        pointwise = torch.ops.mkldnn._linear_pointwise.default

        def by_blocks(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = pointwise(x.reshape(rows, width), blocked, offset, "none", [], "").view(shape)
            return y if residual is None else y.add_(residual)

        return by_blocks
    if ("linear plain", dtype) not in packed:
        packed["linear plain", dtype] = weight.detach().to(dtype)
    plain = packed["linear plain", dtype]

    def by_library(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, plain, offset)
        return y if residual is None else y.add_(residual)

    return by_library
