"""group_norm_silu through csrc/cpu/group_norm_silu.cpp, and csrc/cuda/group_norm_silu.cu where that serves."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.group_norm_silu.planes import planes

# Groups a block, warps a block and vectors a thread of the CUDA kernel, for measurements; 0 is the kernel's own choice.
BLOCK = (0, 0, 0)


def parameters(
    out: Tensor, x: Tensor, x2: Tensor | None, add: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    groups: int, eps: float, silu: bool, last: bool,
):  # -> _C.GroupNormSiluParams  # fmt: skip
    """A call as the extension takes it.

    Args:
        out, x, x2: [B, C, …], [B, C1, …], [B, C2, …] of one dtype, not empty, their channels (``last``) or else their
            pixels dense (planes.walkable).
        add: [B, C], its rows dense, or [C].
        weight, bias: [C]. These three are contiguous, of float32, bfloat16 or float16.
    """
    module = native.extension()
    assert not isinstance(module, str)
    params = module.GroupNormSiluParams()
    params.batch, params.channels = x.shape[0], x.shape[1]
    params.pixels = x.shape[2:].numel()
    params.groups, params.dtype, params.channels_last = groups, native.DTYPES[x.dtype], last
    params.x, params.out = _planes(module, x, last), _planes(module, out, last)
    if x2 is not None:
        params.channels2, params.x2 = x2.shape[1], _planes(module, x2, last)
    for name, tensor in (("add", add), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            batch_stride = tensor.stride(0) if tensor.ndim == 2 and len(tensor) > 1 else 0
            setattr(params, name, module.Channels(tensor.data_ptr(), native.DTYPES[tensor.dtype], batch_stride))
    params.eps, params.silu = eps, silu
    params.block_groups, params.block_warps, params.thread_vecs = BLOCK
    return params


def refusal(params, device: torch.device) -> str | None:
    """Why the device's kernel does not serve a call, or None where it does. The CPU's serves all."""
    if device.type == "cpu":
        return None
    plan = native.extension().group_norm_silu_plan(params)  # type: ignore[union-attr]
    return plan if isinstance(plan, str) else None


def bind(params, arguments: tuple[Any, ...], otherwise: Callable[[], Any]):  # -> call(x, x2, add) -> out
    """A call for tensors of the layout that ``parameters`` were made of; threads may share it.

    CUDA's kernel reads vectors of 16 bytes, so that tensors at other addresses than a multiple of it need another:
    ``otherwise`` binds that.
    """
    module = native.extension()
    assert not isinstance(module, str)
    example, *_, weight, bias = arguments[:6]
    shape, strides, dtype, device = example.shape, example.stride(), example.dtype, example.device
    run, argument = native.at(module, "group_norm_silu", device)
    empty, address = torch.empty_strided, native.address

    # The parameters hold the addresses of the tensors that are kept.
    def call(x: Tensor, x2: Tensor | None = None, add: Tensor | None = None, *, _kept=(weight, bias)) -> Tensor:
        out = empty(shape, strides, dtype=dtype, device=device)
        second, shift = 0 if x2 is None else x2.data_ptr(), 0 if add is None else add.data_ptr()
        run(params, argument(), x.data_ptr(), second, shift, out.data_ptr())
        return out

    if device.type == "cpu":
        return call

    def aligned(x: Tensor, x2: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        if (x.data_ptr() | address(x2) | address(add)) % 16:
            return otherwise()(x, x2, add)
        return call(x, x2, add)

    return aligned


def _planes(module: ModuleType, tensor: Tensor, last: bool):  # -> _C.Planes
    strides = planes(tensor, last)
    assert strides is not None
    return module.Planes(tensor.data_ptr(), *strides)
