"""Attention (Vaswani et al. 2017, Equation 1) in plain PyTorch, and its gradient; nothing of size N × M is kept."""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = 1 << 24  # computed at a time, at most, where a row of all heads is no more


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, [B, H, N, D]; float32, or float64 where q is: the oracle.

    Args:
        q: [B, H, N, D].
        k, v: [B, H, M, D].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)
    return torch.cat([_weights(rows, k, scale) @ v for rows in q.to(wide).split(_rows(k), 2)], 2)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each in its own dtype: Dao et al. 2022, Appendix B.2, in blocks of queries.

    With P the weights and O = P v: ∂v = Pᵀ ∂O, ∂P = ∂O vᵀ, ∂S = P (∂P − ⟨P, ∂P⟩), ∂q = scale ∂S k, ∂k = scale ∂Sᵀ q.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    wide_k, wide_v = k.to(wide), v.to(wide)
    grad_q, grad_k, grad_v = [], torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    blocks = (t.to(wide).split(_rows(k), 2) for t in (q, grad))
    for rows, grad_rows in zip(*blocks, strict=True):
        weights = _weights(rows, wide_k, scale)
        grad_weights = grad_rows @ wide_v.mT
        grad_scores = scale * weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        grad_q.append(grad_scores @ wide_k)
        grad_k = grad_k + grad_scores.mT @ rows
        grad_v = grad_v + weights.mT @ grad_rows
    return torch.cat(grad_q, 2).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.softmax(scale * (q @ k.mT), -1)


def _rows(k: Tensor) -> int:
    """Queries of a block."""
    return max(1, SCORES // max(1, k.shape[:3].numel()))
