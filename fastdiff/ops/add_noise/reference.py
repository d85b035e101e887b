"""The noising step in plain PyTorch: x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (Ho et al. 2020, Equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def add_noise(x0: Tensor, z: Tensor, t: Tensor, coefficients: Tensor) -> Tensor:
    """x_t in the dtype of z (float32, or float64 for the oracle).

    Args:
        x0: [B, …].
        z: the noise, [B, …].
        t: int64 [B]; a t outside [0, T) gives NaN.
        coefficients: [T, 2] in the dtype of z: √ᾱ_t, √(1 − ᾱ_t).
    """
    known = (t >= 0) & (t < len(coefficients))
    pair = torch.where(known[:, None], coefficients[t.clamp(0, len(coefficients) - 1)], float("nan"))
    alpha, sigma = (pair[:, k].view(-1, *[1] * (x0.ndim - 1)) for k in range(2))
    return x0.to(z.dtype) * alpha + z * sigma
