"""What the tests of distilled networks' samplers share: (x̂_0, ε) of VP states in float64."""

import math

import torch
from torch import Tensor

from fastdiff import NoiseSchedule

LINEAR = NoiseSchedule.linear()
SHAPE = (2, 3, 4, 4)


def tensors(count: int) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=torch.float64) for _ in range(count)]


def bar_at(t: int) -> float:
    return float(LINEAR.alphas_cumprod[t])


def vp_pair(prediction: str, x: Tensor, m: Tensor, bar: float) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε) at ᾱ."""
    a, s = math.sqrt(bar), math.sqrt(1 - bar)
    if prediction == "epsilon":
        return (x - s * m) / a, m
    if prediction == "v_prediction":
        return a * x - s * m, s * x + a * m
    return m, (x - a * m) / s
