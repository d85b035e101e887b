"""randn through csrc/{cpu/randn.cpp, cuda/randn.cu}."""

from __future__ import annotations

from torch import Tensor

from fastdiff.noise import NoiseKey
from fastdiff.ops import native


def randn(out: Tensor, key: NoiseKey, draw: int, stream: int) -> None:
    """Fill ``out`` [B, …], of float32, bfloat16 or float16 and walkable strides."""
    elements, batch = out.numel(), out.shape[0]
    if elements == 0:
        return
    module = native.extension()
    assert not isinstance(module, str)
    params = module.RandnParams()
    params.batch, params.n = batch, elements // batch
    params.out, params.key = native.view(module, out), native.key(module, key)
    params.draw, params.stream = draw, stream
    native.launch(module, "randn", params, out.device)
