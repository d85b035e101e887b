"""Attention softmax(q kᵀ · scale) v (Vaswani et al. 2017, Equation 1), for heads of up to 512 channels.

reference.py says what is computed; triton_impl.py is one kernel for every head size; torch's own kernels serve where
choice.json prefers them, and the CPU.
"""

from __future__ import annotations

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.backend import VARIABLE, why_missing
from fastdiff.ops.randn import DTYPES
from fastdiff.ops.registry import LIBRARY, register, traced

BACKENDS = ("torch", "triton", "reference")
LARGEST_HEAD = 512


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ · scale) v, heads apart.

    Args:
        q: [B, H, N, D] of float32, bfloat16 or float16, of any strides; D from 1 to 512.
        k, v: [B, H, M, D] of q's dtype; M at least 1.
        scale: 1/√D where None.
        backend: "auto", "torch" (scaled_dot_product_attention), "triton" or "reference". There is no native kernel;
            where FASTDIFF_BACKEND names one that this operation lacks, it does as for "auto".

    Returns:
        [B, H, N, D] of q's dtype, a view of a contiguous [B, N, H, D]: what a projection of the heads side by side
        reads. Scores and sums are float32; tf32 is used where torch.backends.cuda.matmul.allow_tf32 asks for it.
        Gradients flow to q, k and v, by the reference's formulas.

    Raises:
        TypeError: for what is no tensor, or another or different dtypes.
        ValueError: for shapes or devices that do not fit, head sizes beyond 512, no keys, a scale that is not finite.
        RuntimeError: for a backend that cannot serve the device, saying why.
    """
    scale = _check(q, k, v, scale)
    backend = _choose(backend, q)
    if traced(q, k, v) or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return torch.ops.fastdiff.attention(q, k, v, scale, backend).transpose(1, 2)
    return _compute(q, k, v, scale, backend).transpose(1, 2)


def choice(device: torch.device | str, head_size: int) -> tuple[str, str]:
    """What "auto" takes on a device for heads of so many channels, and why."""
    device = torch.device(device)
    if device.type != "cuda":
        return "torch", "there is no other fast kernel for it"
    if why_missing("triton", "cuda") is not None:
        return "torch", str(why_missing("triton", "cuda"))
    major, minor = torch.cuda.get_device_capability(device)
    chip = f"sm_{major}{minor}" if torch.version.hip is None else "hip"
    table = _table()
    sizes = table.get(chip, table["default"])
    size = min(size for size in map(int, sizes) if size >= head_size)
    origin = f"measured on {chip}" if chip in table else "by the limits of torch's kernels; not measured"
    return sizes[str(size)], f"heads of up to {size} channels, {origin}"


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, str]]:
    return json.loads(Path(__file__).with_name("choice.json").read_text(encoding="utf-8"))


def _choose(backend: str, q: Tensor) -> str:
    origin = "backend"
    if backend == "auto" and os.environ.get(VARIABLE) in BACKENDS:
        backend, origin = os.environ[VARIABLE], VARIABLE
    if backend == "auto":
        return choice(q.device, q.shape[3])[0]
    if backend not in BACKENDS:
        raise ValueError(f"attention's {origin} is {backend!r}; it must be auto, {', '.join(BACKENDS)}")
    reason = why_missing(backend, q.device.type) if backend == "triton" else None
    if reason is not None:
        raise RuntimeError(f"{origin}={backend!r} cannot serve {q.device.type} tensors: {reason}")
    return backend


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16; got {t.dtype}")
        if t.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}; got {t.dtype}")
        if t.ndim != 4:
            raise ValueError(f"{name} must have shape [batch, heads, tokens, channels]; got {list(t.shape)}")
        if t.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}; got {t.device}")
    B, H, _, D = q.shape
    if not 1 <= D <= LARGEST_HEAD:
        raise ValueError(f"q's heads must have from 1 to {LARGEST_HEAD} channels; got {D}")
    if k.shape[:2] != (B, H) or k.shape[3] != D:
        raise ValueError(f"k must have shape [{B}, {H}, keys, {D}]; got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {list(k.shape)}; got {list(v.shape)}")
    if k.shape[2] == 0:
        raise ValueError("k must have at least one key; got none")
    if scale is None:
        return 1 / math.sqrt(D)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or None; got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale}")
    return float(scale)


def _compute(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    """[B, N, H, D], contiguous."""
    if q.numel() == 0:
        return _fake(q)
    if backend == "triton":
        from fastdiff.ops.attention.triton_impl import attention as triton

        out = _fake(q)
        triton(out, q, k, v, scale)
        return out
    if backend == "torch":
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
    from fastdiff.ops.attention.reference import attention as reference

    return reference(q, k, v, scale).to(q.dtype).transpose(1, 2).contiguous()


def _fake(q: Tensor, *_: Any) -> Tensor:
    B, H, N, D = q.shape
    return q.new_empty(B, N, H, D)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.scale = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from fastdiff.ops.attention.reference import backward

    return *backward(grad.transpose(1, 2), *ctx.saved_tensors, ctx.scale), None, None


register("attention(Tensor q, Tensor k, Tensor v, float scale, str backend) -> Tensor", _compute, _fake)
torch.library.register_autograd("fastdiff::attention", _backward, setup_context=_save, lib=LIBRARY)
