"""conv_epilogue through csrc/cpu/conv_epilogue.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.conv_epilogue.layout import row_strides, walk_of


def bind(
    out: Tensor, x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
):  # -> call(x, add, residual) -> out
    """A call for tensors of these layouts, which are not empty; threads may share it.

    Args:
        out, x, residual: examples [B, C, …] of one dtype, float32, bfloat16 or float16, and of walkable strides.
        bias: [C], contiguous.
        add: an example, [B, C] or [1, C], its channels side by side.
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
    if residual is not None:
        params.residual = rows(residual)
    bias = None if bias is None else bias.to(torch.float32)
    shift = shift_of(bias, add)
    if shift is not None:
        params.shift, params.shift_stride = shift.data_ptr(), 0 if len(shift) == 1 else shift.stride(0)
    constant = None if add is not None else shift
    run, argument = native.at(module, "conv_epilogue", out.device)
    shape, strides, dtype, device = out.shape, out.stride(), out.dtype, out.device
    empty, address = torch.empty_strided, native.address

    def call(x: Tensor, add: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        out = empty(shape, strides, dtype=dtype, device=device)
        shift = constant if add is None else shift_of(bias, add)
        run(params, argument(), x.data_ptr(), address(shift), address(residual), out.data_ptr())
        return out

    return call


def shift_of(bias: Tensor | None, add: Tensor | None) -> Tensor | None:
    """bias + add, float32 [B, C] or [1, C], its channels side by side: too few numbers for a pass of their own.

    What is computed takes over strides that the kernel does not walk, such as those of overlapping rows: hence the
    copies.
    """
    if add is None:
        return None if bias is None else bias[None]
    if bias is not None:
        return (bias + add.to(torch.float32)).contiguous()
    return add if add.dtype == torch.float32 else add.to(torch.float32).contiguous()
