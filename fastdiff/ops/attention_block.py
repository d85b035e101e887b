"""The attention block of the DDPM UNet (Ho et al. 2020, Appendix B) without copies between layouts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checks import DTYPES
from fastdiff.ops.attention import attention
from fastdiff.ops.group_norm_silu import group_norm_silu


def attention_block(
    x: Tensor,
    groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    heads: int = 1,
    eps: float = 1e-5,
    rescale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """y = (x + W_out · attention(W_qkv · GroupNorm(x))) / rescale, over the pixels of x.

    The projections are 1×1 convolutions of channels_last tensors, so that queries, keys and values are views of one
    [B, H·W, 3, heads, D] and nothing is transposed. Gradients flow to every tensor.

    Args:
        x: [B, C, H, W] of float32, bfloat16 or float16; computed channels_last.
        groups: of the normalisation; divides C.
        norm_weight, norm_bias: [C] or None, as for ``group_norm_silu``.
        qkv_weight, qkv_bias: [3·I, C] and [3·I] or None, in x's dtype: queries, keys and values one after another, each
            of heads · D = I channels.
        out_weight, out_bias: [C, I] and [C] or None, in x's dtype.
        heads: divides I.
        eps: of the normalisation.
        rescale: what the sum is divided by; 1 costs nothing.
        backend: "auto", "triton" or "reference": what the normalisation and the attention both have.

    Returns:
        [B, C, H, W], channels_last.

    Raises:
        TypeError: for what is no tensor, or of another dtype.
        ValueError: for a shape that does not fit, or a rescale that is 0 or not finite.
    """
    _check(x, qkv_weight, qkv_bias, out_weight, out_bias, heads, rescale)
    x = x.contiguous(memory_format=torch.channels_last)
    h = group_norm_silu(x, norm_weight, norm_bias, groups, eps, silu=False, backend=backend)
    qkv = F.conv2d(h, qkv_weight[:, :, None, None], qkv_bias)
    h = attend(qkv, heads, backend)
    y = x + F.conv2d(h, out_weight[:, :, None, None], out_bias)
    return y if rescale == 1 else y / rescale


def attend(qkv: Tensor, heads: int, backend: str = "auto") -> Tensor:
    """Attention over pixels: [B, 3·I, H, W] to [B, I, H, W], both channels_last; queries, keys and values are views."""
    batch, channels, height, width = qkv.shape
    pixels = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, heads, channels // (3 * heads))
    q, k, v = pixels.permute(2, 0, 3, 1, 4)
    h = attention(q, k, v, backend=backend)  # [B, heads, H·W, D], a view of [B, H·W, heads, D]
    return h.transpose(1, 2).reshape(batch, height, width, channels // 3).permute(0, 3, 1, 2)


def _check(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    rescale: float,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16; got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"x must have shape [B, C, H, W]; got {list(x.shape)}")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be an int of at least 1; got {heads!r}")
    if not math.isfinite(rescale) or rescale == 0:
        raise ValueError(f"rescale must be finite and not 0; got {rescale}")
    channels = x.shape[1]
    width = len(qkv_weight) // 3 if isinstance(qkv_weight, Tensor) and qkv_weight.ndim == 2 else 0
    if not width or len(qkv_weight) % (3 * heads):
        got = list(qkv_weight.shape) if isinstance(qkv_weight, Tensor) else type(qkv_weight).__name__
        raise ValueError(f"qkv_weight must have shape [3·I, {channels}], I a multiple of heads = {heads}; got {got}")
    shapes = {
        "qkv_weight": (qkv_weight, [3 * width, channels]),
        "qkv_bias": (qkv_bias, [3 * width]),
        "out_weight": (out_weight, [channels, width]),
        "out_bias": (out_bias, [channels]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None and name.endswith("bias"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}; got {tensor.dtype}")
        if list(tensor.shape) != shape or tensor.device != x.device:
            raise ValueError(f"{name} must have shape {shape} on {x.device}; got {list(tensor.shape)}, {tensor.device}")
