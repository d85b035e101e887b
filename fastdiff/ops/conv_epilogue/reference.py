"""A convolution's epilogue in plain PyTorch: y = ((x + (bias + add)) + residual) · scale."""

from __future__ import annotations

import torch
from torch import Tensor


def conv_epilogue(x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float) -> Tensor:
    """y in float32.

    Args:
        x, residual: [B, C, …].
        bias: [C].
        add: [C], [1, C] or [B, C].
    """
    y = x.to(torch.float32)
    shifts = [t.to(torch.float32) for t in (bias, add) if t is not None]
    if shifts:
        shift = shifts[0] if len(shifts) == 1 else shifts[0] + shifts[1]  # [C], [1, C] or [B, C]
        y = y + shift.view(-1, x.shape[1], *[1] * (x.ndim - 2))
    if residual is not None:
        y = y + residual.to(torch.float32)
    return y if scale == 1 else y * scale
