"""packed_winograd_conv through csrc/cpu/winograd_conv.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native


def winograd_conv(
    out: Tensor, x: Tensor, weights: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: bool
) -> None:
    """Fill ``out``, which is not empty.

    Args:
        out, x, residual: dense channels_last images of one dtype.
        weights: of ``pack``.
        bias: [N], float32, contiguous.
    """
    module = native.extension()
    assert not isinstance(module, str)
    params = module.WinogradConvParams()
    params.batch, params.channels, params.height, params.width = x.shape
    params.features, params.dtype = out.shape[1], native.DTYPES[x.dtype]
    params.upsample, params.pairs = upsample, weights.dtype == torch.bfloat16
    params.x, params.weights, params.out = x.data_ptr(), weights.data_ptr(), out.data_ptr()
    params.bias, params.residual = native.address(bias), native.address(residual)
    native.launch(module, "winograd_conv", params, x.device)
