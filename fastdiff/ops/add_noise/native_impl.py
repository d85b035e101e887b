"""add_noise through csrc/{cpu/add_noise.cpp, cuda/add_noise.cu}."""

from __future__ import annotations

from torch import Tensor

from fastdiff.noise import NoiseKey
from fastdiff.ops import native


def add_noise(
    out: Tensor,
    noise_out: Tensor | None,
    x0: Tensor,
    noise: Tensor | None,
    t: int | Tensor,
    coefficients: Tensor,
    key: NoiseKey,
    draw: int,
    stream: int,
) -> None:
    """Fill ``out`` with x_t and, where given, ``noise_out`` with the noise.

    Args:
        out, noise_out, x0, noise: [B, …] of float32, bfloat16 or float16 and walkable strides. noise None draws it.
        t: an index, or int64 [B] on the tensors' device.
        coefficients: float32 [T, 2], contiguous, on the tensors' device.
    """
    elements, batch = out.numel(), out.shape[0]
    if elements == 0:
        return
    module = native.extension()
    assert not isinstance(module, str)
    params = module.AddNoiseParams()
    params.batch, params.n, params.T = batch, elements // batch, coefficients.shape[0]
    params.x0, params.out = native.view(module, x0), native.view(module, out)
    if noise is not None:
        params.noise = native.view(module, noise)
    if noise_out is not None:
        params.noise_out = native.view(module, noise_out)
    params.coefficients = coefficients.data_ptr()
    if isinstance(t, Tensor):
        params.timesteps = t.data_ptr()
    else:
        params.timestep = t
    params.key, params.draw, params.stream = native.key(module, key), draw, stream
    native.launch(module, "add_noise", params, out.device)
