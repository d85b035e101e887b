"""GroupNorm (Wu & He 2018), and SiLU y σ(y) after it, in one operation that never concatenates its two inputs.

reference.py says what is computed; csrc/cpu/group_norm_silu.cpp and triton_impl.py compute it in float32 with
statistics that stay accurate where |mean| is far above the standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_dense, check_float32, check_int, check_one_of
from fastdiff.ops import native
from fastdiff.ops.backend import check_backend, select
from fastdiff.ops.group_norm_silu import native_impl
from fastdiff.ops.group_norm_silu.planes import dense_channels, memory_format, walkable
from fastdiff.ops.registry import LIBRARY, register, traced, transformed

KERNELS = {"native": "native", "triton": "triton", "reference": "reference"}
Call = Callable[..., Tensor]


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """silu(group_norm(cat([x, x2], 1) + add, groups, weight, bias, eps)).

    Args:
        x: [B, C1, …] of float32, bfloat16 or float16, of any strides and any number of dimensions from two.
        weight, bias: [C] with C = C1 + C2, of float32 or x's dtype; None for 1 and 0.
        groups: of C / groups channels each, so it must divide C; they may straddle the border of x and x2.
        eps: added to the variance, at least 0.
        x2: [B, C2, …] of x's dtype, the channels after x's: a UNet's skip connection.
        add: a number a channel, added before: [C], [1, C] or [B, C] of float32 or x's dtype: a time embedding.
        silu: whether SiLU follows.

    Returns:
        [B, C, …] of x's dtype, channels_last where x is (or is a slice of such a tensor), else contiguous. The
        arithmetic is float32, rounded once at the end. Gradients flow to all five tensors.

    Raises:
        TypeError, ValueError: for arguments outside these ranges. RuntimeError: for a backend that cannot run here.
    """
    groups, eps = _check(x, weight, bias, groups, eps, x2, add, silu)
    check_backend("group_norm_silu", backend)
    if transformed():
        from fastdiff.ops.group_norm_silu.reference import group_norm_silu as reference

        return reference(x, x2, add, weight, bias, groups, eps, silu).to(x.dtype)
    tensors = (x, x2, add, weight, bias)
    if traced(*tensors) or (torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])):
        return torch.ops.fastdiff.group_norm_silu(x, x2, add, weight, bias, groups, eps, silu, backend)
    return _compute(x, x2, add, weight, bias, groups, eps, silu, backend)


def bind(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = True,
    backend: str = "auto",
) -> Call:
    """``group_norm_silu`` for one layout, without gradients: everything is checked and decided here, once.

    Args:
        x, x2, add: examples, whose shape, strides, dtype and device every call's tensors must have.
        weight, bias: the call keeps the memory of these tensors, or contiguous copies of strided ones; so it must be
            bound anew after a strided one was written to, or either was replaced, also through ``.data``.
        groups, eps, silu, backend: as for ``group_norm_silu``.

    Returns:
        call(x, x2, add) -> Tensor with the bits of ``group_norm_silu``. It checks nothing and may be shared by threads.

    Raises:
        As ``group_norm_silu``.
    """
    groups, eps = _check(x, weight, bias, groups, eps, x2, add, silu)
    check_backend("group_norm_silu", backend)
    return _bind(x, x2, add, weight, bias, groups, eps, silu, backend)


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, x2: Tensor | None,
    add: Tensor | None, silu: bool,
) -> tuple[int, float]:  # fmt: skip
    """``groups`` and ``eps`` as Python's own numbers."""
    _check_input("x", x)
    if x2 is not None:
        _check_input("x2", x2)
        if x2.dtype != x.dtype:
            raise TypeError(f"x2 must have x's dtype {x.dtype}; got {x2.dtype}")
        if x2.ndim != x.ndim or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]:
            raise ValueError(f"x2 must have x's shape {list(x.shape)} but for its channels; got {list(x2.shape)}")
        if x2.device != x.device:
            raise ValueError(f"x2 must be on x's device {x.device}; got {x2.device}")
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    wide_or_same = (torch.float32, x.dtype)
    check_one_of("weight", weight, x, wide_or_same, ((channels,),))
    check_one_of("bias", bias, x, wide_or_same, ((channels,),))
    check_one_of("add", add, x, wide_or_same, ((channels,), (1, channels), (x.shape[0], channels)))
    groups = check_int("groups", groups, 1, (1 << 31) - 1)
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels; got {groups}")
    eps = check_float32("eps", eps, 0)
    if not isinstance(silu, bool):
        raise TypeError(f"silu must be a bool; got {type(silu).__name__}")
    return groups, eps


def _check_input(name: str, x: Tensor) -> None:
    check_dense(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape [B, C, …]; got {list(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have channels; got {list(x.shape)}")


def _compute(
    x: Tensor, x2: Tensor | None, add: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int,
    eps: float, silu: bool, backend: str,
) -> Tensor:  # fmt: skip
    return _bind(x, x2, add, weight, bias, groups, eps, silu, backend)(x, x2, add)


def _bind(
    x: Tensor, x2: Tensor | None, add: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int,
    eps: float, silu: bool, backend: str,
) -> Call:  # fmt: skip
    if x.numel() == 0 and (x2 is None or x2.numel() == 0):
        return lambda x, x2=None, add=None: _fake(x, x2)
    # Where there is one pixel, both formats are the same memory, and its channels are what is dense.
    format = memory_format(x)
    last = format == torch.channels_last or x.shape[2:].numel() == 1

    def walked(x: Tensor, x2: Tensor | None, add: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        second = None if x2 is None else walkable(x2, last, format)
        return walkable(x, last, format), second, dense_channels(add)

    examples = walked(x, x2, add)
    # Detached, so that memory whose address is bound stays even where a parameter is given other (``p.data = …``).
    affine = tuple(None if t is None else t.detach().contiguous() for t in (weight, bias))
    call = _bind_walked((_fake(x, x2), *examples, *affine, groups, eps, silu, last), backend)
    if all(a is b for a, b in zip(examples, (x, x2, add), strict=True)):
        return call
    return lambda x, x2=None, add=None: call(*walked(x, x2, add))  # the kernels walk copies of such strides


def _bind_walked(arguments: tuple[Any, ...], backend: str) -> Call:
    """The call of native_impl's or triton_impl's arguments, or of the reference."""
    out, *_, weight, bias, groups, eps, silu, _ = arguments
    device = out.device
    params = None
    if native.missing(device.type, "group_norm_silu") is None:
        params = native_impl.parameters(*arguments)
    size = out.shape[1] // groups * out.element_size()
    kernel = select(
        "group_norm_silu", backend, device, {"pixels": out.shape[2:].numel(), "bytes": size}, KERNELS,
        lambda kernel: native_impl.refusal(params, device) if kernel == "native" else None,
    )  # fmt: skip
    if kernel == "native":
        return native_impl.bind(params, arguments, lambda: _bind_walked(arguments, "triton"))
    if kernel == "triton":
        from fastdiff.ops.group_norm_silu import triton_impl

        return triton_impl.bind(*arguments)
    from fastdiff.ops.group_norm_silu.reference import group_norm_silu as reference

    shape, strides = out.shape, out.stride()

    def by_reference(x: Tensor, x2: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        out = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
        return out.copy_(reference(x, x2, add, weight, bias, groups, eps, silu))

    return by_reference


def _fake(x: Tensor, x2: Tensor | None, *rest: Any) -> Tensor:
    """The result, not filled."""
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:8]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from fastdiff.ops.group_norm_silu.reference import backward

    return *backward(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None, None


register(
    "group_norm_silu(Tensor x, Tensor? x2, Tensor? add, Tensor? weight, Tensor? bias, int groups, float eps, "
    "bool silu, str backend) -> Tensor",
    _compute,
    _fake,
)
torch.library.register_autograd("fastdiff::group_norm_silu", _backward, setup_context=_save, lib=LIBRARY)
