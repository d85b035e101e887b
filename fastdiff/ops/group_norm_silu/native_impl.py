"""group_norm_silu through csrc/cpu/group_norm_silu.cpp, and csrc/cuda/group_norm_silu.cu where that serves."""

from __future__ import annotations

from types import ModuleType

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
            batch_stride = tensor.stride(0) if tensor.ndim == 2 else 0
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


def slower(params, device: torch.device) -> bool:
    """Whether Triton's kernel was faster for such shapes: small groups, and those that fill a GPU's sectors of memory.

    Measured on an H100; the batch takes no part, so that a sample's bits do not depend on it.
    """
    size = (params.channels + params.channels2) // params.groups * (4 if params.dtype == 0 else 2)  # bytes a pixel
    return device.type == "cuda" and not (params.pixels >= 1024 or (params.pixels >= 256 and size < 32))


def run(params, device: torch.device) -> None:
    """Fill ``out``."""
    module = native.extension()
    assert not isinstance(module, str)
    native.launch(module, "group_norm_silu", params, device)


def _planes(module: ModuleType, tensor: Tensor, last: bool):  # -> _C.Planes
    strides = planes(tensor, last)
    assert strides is not None
    return module.Planes(tensor.data_ptr(), *strides)
