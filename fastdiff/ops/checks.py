"""What operations ask of a tensor: every one before it looks at the shape, and those on images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.ops.randn import DTYPES


def check_dense(name: str, tensor: Any) -> None:
    """Raises TypeError for what is no dense tensor of float32, bfloat16 or float16."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16; got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got {tensor.layout}")


def check_image(x: Any) -> None:
    """Raises TypeError for what is no dense tensor of floating point, ValueError where it is no image with pixels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if not x.is_floating_point() or x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor of floating point; got a {x.layout} one of {x.dtype}")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have the shape [B, C, H, W] with C, H, W > 0; got {list(x.shape)}")


def check_operand(name: str, operand: Any, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Raises TypeError for what is no dense tensor of x's dtype, or of ``dtypes``; ValueError for another shape, or
    another device than x's.
    """
    if not isinstance(operand, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(operand).__name__}")
    if operand.dtype not in (x.dtype, *dtypes) or operand.layout != torch.strided:
        allowed = " or ".join(map(str, dict.fromkeys((x.dtype, *dtypes))))
        raise TypeError(f"{name} must be a dense tensor of {allowed}; got a {operand.layout} one of {operand.dtype}")
    if operand.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}; got {list(operand.shape)}")
    if operand.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}; got {operand.device}")
