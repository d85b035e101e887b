"""conv2d by Winograd's products through csrc/cpu/winograd_conv.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.conv2d.winograd import pack
from fastdiff.ops.packed import bias_of

LAST = torch.channels_last


def bind(
    x: Tensor, weight: Tensor, bias: Tensor | None, upsample: bool, residual: Tensor | None, packed: dict[Any, Any]
) -> Callable[..., Tensor]:
    """call(x, residual=None, inputs=()) for images of these layouts; arguments as for ``conv2d.bind``."""
    module = native.extension()
    assert not isinstance(module, str)
    key = "winograd", x.dtype, upsample
    if key not in packed:
        packed[key] = pack(weight, upsample=upsample, dtype=x.dtype)
    weights, offset = packed[key], bias_of(packed, bias, torch.float32)
    params = module.WinogradConvParams()
    params.batch, params.channels, params.height, params.width = x.shape
    params.features, params.dtype = len(weight), native.DTYPES[x.dtype]
    params.upsample, params.pairs = upsample, weights.dtype == torch.bfloat16
    # Addresses stand for those of each call, but for the weights' and the bias's, which the call keeps.
    params.x, params.out, params.residual = x.data_ptr(), x.data_ptr(), native.address(residual)
    params.weights, params.bias = weights.data_ptr(), native.address(offset)
    size = 2 if upsample else 1
    shape = (x.shape[0], len(weight), size * x.shape[2], size * x.shape[3])
    strides = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST).stride()
    run, argument = native.at(module, "winograd_conv", x.device)
    dtype, device, empty = x.dtype, x.device, torch.empty_strided

    def call(
        x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = (), *, _kept=(weights, offset)
    ) -> Tensor:
        out = empty(shape, strides, dtype=dtype, device=device)
        other = 0 if residual is None else residual.data_ptr()
        run(params, argument(), x.data_ptr(), other, out.data_ptr())
        return out

    if all(t is None or t.is_contiguous(memory_format=LAST) for t in (x, residual)):
        return call

    def copied(x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> Tensor:
        other = None if residual is None else residual.contiguous(memory_format=LAST)
        return call(x.contiguous(memory_format=LAST), other)

    return copied
