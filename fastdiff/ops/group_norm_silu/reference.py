"""GroupNorm (Wu & He 2018) and SiLU in plain PyTorch, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def group_norm_silu(
    x: Tensor, x2: Tensor | None, add: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int,
    eps: float, silu: bool,
) -> Tensor:  # fmt: skip
    """y sigmoid(y), or y, with y = group_norm(cat(x, x2) + add); float32, or float64 where x is.

    Args:
        x, x2: [B, C1, …] and [B, C2, …]; C = C1 + C2.
        add: [C], [1, C] or [B, C].
        weight, bias: [C].
    """
    normalised, _ = _normalise(x, x2, add, groups, eps)
    y = _affine(normalised, weight, bias)
    return y * torch.sigmoid(y) if silu else y


def backward(
    grad: Tensor, x: Tensor, x2: Tensor | None, add: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    groups: int, eps: float, silu: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, x2, add, weight and bias, each in its own dtype; None for those absent."""
    normalised, rstd = _normalise(x, x2, add, groups, eps)
    grad_y = grad.to(normalised.dtype)
    if silu:
        y = _affine(normalised, weight, bias)
        s = torch.sigmoid(y)
        grad_y = grad_y * (s * (1 + y * (1 - s)))
    pixels = list(range(2, x.ndim))
    each = [0, *pixels]
    grad_weight = None if weight is None else (grad_y * normalised).sum(each).to(weight.dtype)
    grad_bias = None if bias is None else grad_y.sum(each).to(bias.dtype)
    grad_normalised = grad_y if weight is None else grad_y * _per_channel(weight, x)
    # h enters its group's mean and variance: ∂/∂h = rstd (g − ⟨g⟩ − n ⟨g n⟩) with n = (h − mean) rstd.
    g, n = _grouped(grad_normalised, groups), _grouped(normalised, groups)
    grad_h = (rstd * (g - g.mean(2, keepdim=True) - n * (g * n).mean(2, keepdim=True))).reshape(grad.shape)
    grad_add = None
    if add is not None:
        grad_add = grad_h.sum(pixels) if pixels else grad_h
        grad_add = (grad_add.sum_to_size(add.shape)).to(add.dtype)
    grad_x2 = None if x2 is None else grad_h[:, x.shape[1] :].to(x2.dtype)
    return grad_h[:, : x.shape[1]].to(x.dtype), grad_x2, grad_add, grad_weight, grad_bias


def _normalise(x: Tensor, x2: Tensor | None, add: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(h − mean) rstd in h's shape, and rstd [B, groups, 1]; computed in float64, rounded once."""
    h = (x if x2 is None else torch.cat([x, x2], 1)).to(torch.float64)
    if add is not None:
        h = h + _per_channel(add, h)
    grouped = _grouped(h, groups)
    wide = torch.promote_types(x.dtype, torch.float32)
    if h.numel() == 0:
        return h.to(wide), grouped.new_zeros(*grouped.shape[:2], 1, dtype=wide)
    variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
    rstd = 1 / torch.sqrt(variance + eps)
    return ((grouped - mean) * rstd).reshape(h.shape).to(wide), rstd.to(wide)


def _affine(normalised: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = normalised if weight is None else normalised * _per_channel(weight, normalised)
    return y if bias is None else y + _per_channel(bias, normalised)


def _grouped(h: Tensor, groups: int) -> Tensor:
    return h.reshape(h.shape[0], groups, h.shape[1:].numel() // groups)


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """[C], [1, C] or [B, C] in the shape and dtype that broadcast against [B, C, …]."""
    wide = v.to(torch.promote_types(x.dtype, torch.float32))
    return wide.reshape(-1 if v.ndim == 2 else 1, v.shape[-1], *[1] * (x.ndim - 2))
