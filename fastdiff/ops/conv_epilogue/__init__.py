"""What follows a convolution, in one pass over memory: y = (x + bias + add + residual) · scale.

In a residual block of the DDPM UNet (Ho et al. 2020, Appendix B) these are the convolution's bias, the projected time
embedding and the skip connection; the scale is 1/√2 in score-SDE's networks (Song et al. 2021, Appendix H).
reference.py says what is computed; csrc/cpu/conv_epilogue.cpp and triton_impl.py give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_dense, check_float32, check_one_of
from fastdiff.ops.backend import choose
from fastdiff.ops.conv_epilogue.layout import walkable
from fastdiff.ops.conv_epilogue.reference import conv_epilogue as reference
from fastdiff.ops.registry import LIBRARY, register, traced, transformed

Call = Callable[..., Tensor]


def conv_epilogue(
    x: Tensor,
    *,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """y = ((x + (bias + add)) + residual) · scale, in float32 and rounded once; what is None takes no part.

    Args:
        x: [B, C, …] of float32, bfloat16 or float16, of any strides; contiguous and channels_last are walked in the
            order of their memory.
        bias: [C], float32 or x's dtype.
        add: [B, C], or [1, C] or [C] for all samples alike; float32 or x's dtype. A time embedding, for one.
        residual: of x's shape and dtype, of any strides.
        scale: a finite number.

    Returns:
        A new tensor of x's shape, dtype and memory format. Gradients flow to all four tensors.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument of another shape or device, or a scale that is not finite in float32.
    """
    _check(x, bias, add, residual, scale)
    backend = choose(backend, x.device.type, "conv_epilogue")
    if transformed():
        return reference(x, bias, add, residual, scale).to(x.dtype)
    given = (x, bias, add, residual)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if needs_grad or traced(*given):
        return torch.ops.fastdiff.conv_epilogue(*given, scale, backend)
    return _compute(*given, scale, backend)


def bind(
    x: Tensor,
    *,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Call:
    """``conv_epilogue`` for one layout, without gradients: everything is checked and decided here, once.

    Args:
        x, add, residual: examples, whose shape, strides, dtype and device every call's tensors must have.
        bias: the call may keep a copy; so it must be bound anew after the bias was replaced or written to.
        scale, backend: as for ``conv_epilogue``.

    Returns:
        call(x, add, residual) -> Tensor with the bits of ``conv_epilogue``. It checks nothing and may be shared by
        threads.

    Raises:
        As ``conv_epilogue``.
    """
    _check(x, bias, add, residual, scale)
    return _bind(x, bias, add, residual, scale, choose(backend, x.device.type, "conv_epilogue"))


def _check(x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float) -> None:
    check_dense("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have the shape [B, C, …]; got {list(x.shape)}")
    batch, channels = x.shape[:2]
    wide_or_same = (x.dtype, torch.float32)
    check_one_of("bias", bias, x, wide_or_same, ((channels,),))
    check_one_of("add", add, x, wide_or_same, ((batch, channels), (1, channels), (channels,)))
    check_one_of("residual", residual, x, (x.dtype,), (tuple(x.shape),))
    check_float32("scale", scale)


def _compute(
    x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float, backend: str
) -> Tensor:
    return _bind(x, bias, add, residual, scale, backend)(x, add, residual)


def _bind(
    x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float, backend: str
) -> Call:
    out = torch.empty_like(x)
    if out.numel() == 0:
        return lambda x, add=None, residual=None: torch.empty_like(x)
    if backend == "reference":
        return lambda x, add=None, residual=None: torch.empty_like(x).copy_(reference(x, bias, add, residual, scale))
    if backend == "native":
        from fastdiff.ops.conv_epilogue import native_impl as impl
    else:
        from fastdiff.ops.conv_epilogue import triton_impl as impl  # type: ignore[no-redef]

    def walked(x: Tensor, add: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        shift = None if add is None else per_sample(add)
        return walkable(x), shift, None if residual is None else walkable(residual)

    examples, target = walked(x, add, residual), walkable(out)
    call = impl.bind(target, examples[0], None if bias is None else bias.contiguous(), *examples[1:], scale)
    if target is not out:  # strides that no kernel can walk are computed contiguous and copied
        return lambda x, add=None, residual=None: torch.empty_like(x).copy_(call(*walked(x, add, residual)))
    if all(a is b for a, b in zip(examples, (x, add, residual), strict=True)):
        return call
    return lambda x, add=None, residual=None: call(*walked(x, add, residual))


def per_sample(add: Tensor) -> Tensor:
    """[B, C] or [1, C], its channels side by side."""
    add = add if add.ndim == 2 else add[None]
    return add if add.stride(1) == 1 or add.shape[1] == 1 else add.contiguous()


def _fake(
    x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float, backend: str
) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, add, _, ctx.scale, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.add_like = None if add is None else (tuple(add.shape), add.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # y is linear in each of the four.
    wide = grad.to(torch.float32) * ctx.scale
    grad_x = wide.to(grad.dtype)
    sums = wide.flatten(2).sum(2) if grad.ndim > 2 else wide  # [B, C]
    grad_bias = sums.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    grad_add = None
    if ctx.needs_input_grad[2]:
        shape, dtype = ctx.add_like
        grad_add = sums.sum_to_size(shape).to(dtype)
    return grad_x, grad_bias, grad_add, grad_x if ctx.needs_input_grad[3] else None, None, None


register(
    "conv_epilogue(Tensor x, Tensor? bias, Tensor? add, Tensor? residual, float scale, str backend) -> Tensor",
    _compute,
    _fake,
)
torch.library.register_autograd("fastdiff::conv_epilogue", _backward, setup_context=_save, lib=LIBRARY)
