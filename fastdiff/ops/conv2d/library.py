"""Convolutions by oneDNN, cuDNN and torch's own kernels, with weights laid out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops import linear
from fastdiff.ops.conv2d.geometry import Geometry
from fastdiff.ops.conv2d.phases import GEOMETRY as TRANSPOSED
from fastdiff.ops.conv2d.phases import presum
from fastdiff.ops.conv_epilogue import bind as bind_epilogue
from fastdiff.ops.packed import bias_of, blocks, onednn, without_autocast

LAST = torch.channels_last
Call = Callable[..., Tensor]


def bind(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, residual: Tensor | None,
    packed: dict[Any, Any], kernel: str,
) -> Call:  # fmt: skip
    """call(x, residual=None, inputs=()) -> channels_last, by the ``kernel`` that choice.py named."""
    make = {"phases": _phases, "product": _product, "blocked": _blocked, "plain": _plain}[kernel]
    run = without_autocast(make(x, weight, bias, geometry, residual, packed), x.device)
    if _last(x):
        return run
    return lambda x, residual=None, inputs=(): run(dense(x), residual)


def dense(image: Tensor) -> Tensor:
    """The image channels_last, with strides by which torch's kernels recognise it as such: itself, a view or a copy."""
    image = image.contiguous(memory_format=LAST)
    return image if _last(image) else image.as_strided(image.shape, _strides(image))


def _last(image: Tensor) -> bool:
    return image.stride() == _strides(image)


def _strides(image: Tensor) -> tuple[int, ...]:
    _, channels, height, width = image.shape
    return channels * height * width, 1, channels * width, channels


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, residual: Tensor | None, packed: dict[Any, Any]
) -> Call:
    """A window of one pixel: a matrix product."""
    batch, channels, height, width = x.shape
    rows = torch.empty(batch, height, width, channels, dtype=x.dtype, device=x.device)
    run = linear.unguarded(rows, weight.flatten(1), bias, packed)

    def call(x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> Tensor:
        other = None if residual is None else residual.permute(0, 2, 3, 1)
        return run(x.permute(0, 2, 3, 1), other).permute(0, 3, 1, 2)

    return call


def _blocked(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, residual: Tensor | None, packed: dict[Any, Any]
) -> Call:
    """oneDNN's convolution, which adds the residual as it stores the result."""
    assert geometry.symmetric is not None
    window = [list(geometry.symmetric), list(geometry.stride), list(geometry.dilation), geometry.groups]
    given = weight.detach().to(x.dtype).contiguous()
    laid = torch.ops.mkldnn._reorder_convolution_weight(given, *window, list(x.shape))
    kept, offset = blocks(packed, ("blocked", x.dtype, geometry), laid), bias_of(packed, bias, x.dtype)
    if residual is None:
        convolve = torch.ops.mkldnn._convolution_pointwise.default
        return lambda x, residual=None, inputs=(): convolve(x, kept, offset, *window, "none", [], "")
    add = torch.ops.mkldnn._convolution_pointwise.binary

    def call(x: Tensor, residual: Tensor, inputs: Sequence[Tensor] = ()) -> Tensor:
        return add(x, dense(residual), kept, offset, *window, "add", 1.0, None, [], None)

    return call


def _phases(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, residual: Tensor | None, packed: dict[Any, Any]
) -> Call:
    """A doubled image on the small grid, by summed weights."""
    offset = bias_of(packed, bias, x.dtype)
    if ("summed", x.dtype) not in packed or onednn(x):
        wide = torch.promote_types(weight.dtype, x.dtype)  # float32 weights of a float64 image are summed as that
        summed = presum(weight.detach().to(wide)).to(x.dtype)
    if onednn(x):
        laid = torch.ops.mkldnn._reorder_convolution_transpose_weight(summed, *TRANSPOSED, 1, list(x.shape))
        kept = blocks(packed, ("phases", x.dtype), laid)
        convolve = torch.ops.mkldnn._convolution_transpose_pointwise.default

        def run(x: Tensor) -> Tensor:
            return convolve(x, kept, offset, *TRANSPOSED, 1, "none", [], "")

    else:
        if ("summed", x.dtype) not in packed:
            packed["summed", x.dtype] = summed
        plain = packed["summed", x.dtype]

        def run(x: Tensor) -> Tensor:
            return F.conv_transpose2d(x, plain, offset, stride=2, padding=1)

    def call(x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> Tensor:
        y = run(x).contiguous(memory_format=LAST)
        return y if residual is None else y.add_(residual)

    return call


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, residual: Tensor | None, packed: dict[Any, Any]
) -> Call:
    """torch's convolution; on a GPU without bias and residual, which are one pass after it."""
    key = "plain", x.dtype
    if key not in packed:
        kept = weight.detach().to(x.dtype)
        # Grouped convolutions of oneDNN read the stride of a dimension of one.
        packed[key] = dense(kept) if geometry.groups > 1 else kept.contiguous(memory_format=LAST)
    kept, offset = packed[key], bias_of(packed, bias, x.dtype)
    padding, sides = geometry.symmetric, (*geometry.padding[1], *geometry.padding[0])
    stride, dilation, groups, upsample = geometry.stride, geometry.dilation, geometry.groups, geometry.upsample
    inside = None if x.is_cuda else offset

    def run(x: Tensor) -> Tensor:
        if upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if padding is None:
            x = F.pad(x, sides).contiguous(memory_format=LAST)
            return torch.conv2d(x, kept, inside, stride, 0, dilation, groups)
        return torch.conv2d(x, kept, inside, stride, padding, dilation, groups)

    if not x.is_cuda or (bias is None and residual is None):

        def call(x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> Tensor:
            y = run(x).contiguous(memory_format=LAST)
            return y if residual is None else y.add_(residual)

        return call
    shape = (x.shape[0], len(weight), *geometry.size(x, weight))
    example = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)
    given = None if bias is None else bias.detach()
    if given is not None and given.dtype not in (torch.float32, x.dtype):
        given = given.to(torch.float32)
    after = bind_epilogue(example, bias=given, residual=residual)

    def with_epilogue(x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> Tensor:
        return after(run(x).contiguous(memory_format=LAST), None, residual)

    return with_epilogue
