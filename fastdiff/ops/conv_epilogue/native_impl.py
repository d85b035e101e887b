"""conv_epilogue through csrc/cpu/conv_epilogue.cpp."""

from __future__ import annotations

from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.conv_epilogue.layout import row_strides, walk_of


def conv_epilogue(
    out: Tensor, x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
) -> None:
    """Fill ``out``, which is not empty.

    Args:
        out, x, residual: [B, C, …] of float32, bfloat16 or float16 and walkable strides.
        bias: [C], contiguous.
        add: [B, C] or [1, C], its channels side by side.
    """
    module = native.extension()
    assert not isinstance(module, str)
    batch, channels = out.shape[:2]
    walk = walk_of(out)

    def rows(tensor: Tensor):  # -> _C.View
        sample, row, element = row_strides(tensor, walk)
        return module.View(tensor.data_ptr(), native.DTYPES[tensor.dtype], sample, walk.length, row, element)

    def vector(tensor: Tensor, stride: int):  # -> _C.View
        return module.View(tensor.data_ptr(), native.DTYPES[tensor.dtype], stride, channels, 0, 1)

    params = module.ConvEpilogueParams()
    params.batch, params.channels_last, params.rows, params.length = batch, *walk
    params.x, params.out, params.scale = rows(x), rows(out), scale
    if bias is not None:
        params.bias = vector(bias, 0)
    if add is not None:
        params.add = vector(add, 0 if len(add) == 1 else add.stride(0))
    if residual is not None:
        params.residual = rows(residual)
    native.launch(module, "conv_epilogue", params, out.device)
