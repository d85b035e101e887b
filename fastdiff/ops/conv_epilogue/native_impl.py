"""conv_epilogue through csrc/cpu/conv_epilogue.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.conv_epilogue.layout import row_strides, walk_of


def conv_epilogue(
    out: Tensor, x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
) -> None:
    """Fill ``out``, which is not empty.

    Args:
        out, x, residual: [B, C, …] of one dtype, float32, bfloat16 or float16, and of walkable strides.
        bias: [C], contiguous.
        add: [B, C] or [1, C], its channels side by side.
    """
    module = native.extension()
    assert not isinstance(module, str)
    walk = walk_of(out)

    def rows(tensor: Tensor):  # -> _C.View
        sample, row, element = row_strides(tensor, walk)
        return module.View(tensor.data_ptr(), native.DTYPES[tensor.dtype], sample, walk.length, row, element)

    params = module.ConvEpilogueParams()
    params.batch, params.channels_last, params.rows, params.length = len(out), *walk
    params.x, params.out, params.scale = rows(x), rows(out), scale
    shift = shift_of(bias, add)
    if shift is not None:
        params.shift, params.shift_stride = shift.data_ptr(), 0 if len(shift) == 1 else shift.stride(0)
    if residual is not None:
        params.residual = rows(residual)
    native.launch(module, "conv_epilogue", params, out.device)


def shift_of(bias: Tensor | None, add: Tensor | None) -> Tensor | None:
    """bias + add, float32 [B, C] or [1, C]: too few numbers for a pass of their own to matter."""
    if bias is None or add is None:
        shift = add if bias is None else bias[None]
        return shift if shift is None else shift.to(torch.float32)
    # A sum takes over strides of its terms that the kernel does not walk, such as those of overlapping rows.
    return (bias.to(torch.float32) + add.to(torch.float32)).contiguous()
