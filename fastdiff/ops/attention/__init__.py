"""Attention softmax(scale · q kᵀ) v (Vaswani et al. 2017, Equation 1), by the kernel that suits its shape.

reference.py says what is computed; native_impl.py (on a CPU) and triton_impl.py compute it in float32; choice.json says
where torch's own kernels (F.scaled_dot_product_attention) are taken instead.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checks import check_dense, check_float32
from fastdiff.ops import native
from fastdiff.ops.attention import native_impl
from fastdiff.ops.backend import check_backend, select
from fastdiff.ops.registry import LIBRARY, register, traced, transformed
from fastdiff.ops.view import overlaps

__all__ = ["attention", "bind"]

LARGEST = 512  # channels of a head
KERNELS = {"native": "native", "triton": "triton", "torch": "torch", "reference": "reference"}
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, backend: str = "auto") -> Tensor:
    """softmax(scale · q kᵀ) v for every sample and head.

    Args:
        q: queries [B, H, N, D] of float32, bfloat16 or float16, of any strides; D from 1 to 512.
        k, v: keys and values [B, H, M, D] of q's dtype, of any strides; M at least 1.
        scale: None for 1 / √D.
        backend: "auto", what choice.json says for the device; or "native" (on a CPU), "triton", "torch" or "reference".

    Returns:
        [B, H, N, D] of q's dtype, the transpose(1, 2) of a contiguous [B, N, H, D], so that a projection of all heads
        reads it without a copy. Gradients flow to q, k and v; they are computed in float32 from recomputed weights.

    Raises:
        TypeError: for what is no tensor, or of another dtype.
        ValueError: for a shape or device that does not fit, a scale that is not finite, or an unknown backend.
        RuntimeError: for a backend that cannot run here.
    """
    scale = _check_all(q, k, v, scale, backend)
    if transformed():
        from fastdiff.ops.attention.reference import attention as reference

        return reference(q, k, v, scale).to(q.dtype)
    if traced(q, k, v) or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return torch.ops.fastdiff.attention(q, k, v, scale, backend)
    return _compute(q, k, v, scale, backend)


def bind(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str = "auto") -> Call:
    """``attention`` for one layout, without gradients: everything is checked and decided here, once.

    Args:
        q, k, v: examples, whose shape, strides, dtype and device every call's tensors must have.
        scale, backend: as for ``attention``.

    Returns:
        call(q, k, v) -> Tensor with the bits of ``attention``. It checks nothing and may be shared by threads.

    Raises:
        As ``attention``.
    """
    return _bind(q, k, v, _check_all(q, k, v, scale, backend), backend)


def _check_all(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> float:
    """The scale, once everything is checked."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check(name, tensor, q)
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {list(k.shape)}; got {list(v.shape)}")
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None; got {type(scale).__name__}")
    else:
        scale = check_float32("scale", scale)
    check_backend("attention", backend, tuple(KERNELS))
    return scale


def _check(name: str, t: Tensor, q: Tensor) -> None:
    check_dense(name, t)
    if t.ndim != 4:
        raise ValueError(f"{name} must have shape [B, H, {'N' if name == 'q' else 'M'}, D]; got {list(t.shape)}")
    if name == "q":
        if not 1 <= t.shape[3] <= LARGEST:
            raise ValueError(f"q must have heads of 1 to {LARGEST} channels, its last dimension; got {list(t.shape)}")
        return
    if t.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype {q.dtype}; got {t.dtype}")
    B, H, _, D = q.shape
    if t.shape[:2] != q.shape[:2] or t.shape[3] != D:
        raise ValueError(f"{name} must have shape [{B}, {H}, M, {D}], as q has; got {list(t.shape)}")
    if t.shape[2] == 0:
        raise ValueError(f"{name} must have at least one key; got {list(t.shape)}")
    if t.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}; got {t.device}")


def _compute(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    return _bind(q, k, v, scale, backend)(q, k, v)


def _bind(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Call:
    if q.numel() == 0:
        return lambda q, k, v: _fake(q)
    # Chosen here and not before, since torch.compile could not trace the look into choice.json.
    matrix = q.dtype == torch.bfloat16 and native.bfloat16() == "matrix"
    facts = {"bits": 8 * q.element_size(), "head": q.shape[3], "keys": k.shape[2], "matrix": matrix}
    why_not = {"native": native_impl.refusal(k)}
    backend = select("attention", backend, q.device, facts, KERNELS, why_not.get)
    if backend == "native":
        return native_impl.bind(q, k, v, scale, _fake)
    if backend == "triton":
        from fastdiff.ops.attention import triton_impl

        def by_triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = _fake(q)
            triton_impl.attention(out.transpose(1, 2), q, k, v, scale)
            return out

        return by_triton
    compute = _torch(q, scale) if backend == "torch" else _reference(scale)
    device_type = q.device.type

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_autocast_enabled(device_type):  # which would change the dtype
            with torch.autocast(device_type, enabled=False):
                return compute(q, k, v)
        return compute(q, k, v)

    return call


def _torch(q: Tensor, scale: float) -> Call:
    """scaled_dot_product_attention for tensors of q's layout."""
    # It gives the result q's strides, even if some of its elements then share their memory.
    copied = overlaps(q)
    # FlashAttention subtracts the largest score before it multiplies, which would overflow for a negative scale.
    negative, size = scale < 0, abs(scale)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if copied:
            q = q.contiguous()
        y = F.scaled_dot_product_attention(-q if negative else q, k, v, scale=size)
        rows = y.transpose(1, 2)  # most of torch's kernels write the wanted layout themselves
        return y if rows.is_contiguous() else rows.contiguous().transpose(1, 2)

    return call


def _reference(scale: float) -> Call:
    from fastdiff.ops.attention.reference import attention as reference

    return lambda q, k, v: _fake(q).copy_(reference(q, k, v, scale))


def _fake(q: Tensor, *rest: Any) -> Tensor:
    """The result, not filled."""
    B, H, N, D = q.shape
    return torch.empty(B, N, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from fastdiff.ops.attention.reference import backward

    q, k, v = ctx.saved_tensors
    return *backward(grad, q, k, v, ctx.scale), None, None


register("attention(Tensor q, Tensor k, Tensor v, float scale, str backend) -> Tensor", _compute, _fake)
torch.library.register_autograd("fastdiff::attention", _backward, setup_context=_save, lib=LIBRARY)
