"""softmax(q kᵀ · scale) v in plain PyTorch (Vaswani et al. 2017, Equation 1), and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = 1 << 26  # that are held at a time


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, H, N, D] in float32, or float64 where q is: the oracle. Queries go in blocks, so that memory is bounded."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (q, k, v))
    rows = max(1, SCORES // max(1, k.shape[2] * q.shape[0] * q.shape[1]))
    return torch.cat([_weights(part, k, scale) @ v for part in q.split(rows, dim=2)], dim=2)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each in its dtype."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v = (t.to(wide) for t in (grad, q, k, v))
    weights = _weights(q, k, scale)
    grad_v = weights.mT @ grad
    grad_weights = grad @ v.mT
    # Of a softmax: P (dP − Σ P dP).
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
    return (grad_scores @ k).to(dtype), (grad_scores.mT @ q).to(dtype), grad_v.to(dtype)


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.softmax(q @ k.mT * scale, dim=-1)
