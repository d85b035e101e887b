"""add_noise as one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.noise import NoiseKey
from fastdiff.ops.triton_noise import key_of, normals
from fastdiff.ops.triton_support import key_arguments, launch
from fastdiff.ops.triton_view import load, place, store, view


@triton.jit(do_not_specialize=["timestep", "T", "seed", "sample_offset", "draw", "stream"])
def add_noise_kernel(
    out, noise_out, x0, noise, coefficients, timesteps, timestep: tl.int64, T: tl.int64,
    seeds, samples, seed: tl.int64, sample_offset: tl.int64, draw: tl.int64, stream: tl.int64, n,
    QUADS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, first, lane, inside = place(n, QUADS)
    t = tl.cast(timestep, tl.int64)
    if timesteps is not None:
        t = tl.load(timesteps + b)
    known = (t >= 0) & (t < T)
    alpha = tl.load(coefficients + 2 * t, mask=known, other=float("nan"))
    sigma = tl.load(coefficients + 2 * t + 1, mask=known, other=float("nan"))
    if len(noise) > 0:
        z = load(noise, b, first, lane, inside, WIDE)
    else:
        s, number = key_of(b, seeds, samples, seed, sample_offset)
        z = normals(first, s, number, draw, stream, QUADS)
    x_t = load(x0, b, first, lane, inside, WIDE) * alpha + z * sigma
    store(out, b, first, lane, inside, x_t, WIDE)
    if len(noise_out) > 0:
        store(noise_out, b, first, lane, inside, z, WIDE)


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
    """Fill ``out`` with x_t and, where given, ``noise_out`` with the noise; arguments as for native_impl."""
    if out.numel() == 0:
        return
    timesteps, timestep = (t, 0) if isinstance(t, Tensor) else (None, t)
    launch(
        add_noise_kernel, out, view(out), view(noise_out), view(x0), view(noise), coefficients, timesteps, timestep,
        len(coefficients), *key_arguments(key), draw, stream,
    )  # fmt: skip
