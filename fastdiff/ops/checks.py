"""What every operation asks of a tensor before it looks at its shape."""

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
