"""Standard normals of the noise stream: out[b, e] = the normal at (seed, sample, draw, stream, e).

reference.py says what is computed; csrc/{common/normal.h, cpu/randn.cpp, cuda/randn.cu} and triton_impl.py compute the
same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.checks import check_device, check_dtype, check_int, check_shape
from fastdiff.noise import NoiseKey, noise_key
from fastdiff.ops.backend import choose
from fastdiff.ops.registry import register, traced, transformed


def randn(
    shape: Sequence[int],
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    draw: int = 0,
    stream: int = 0,
    sample_offset: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str = "auto",
) -> Tensor:
    """Standard normals that depend on nothing but what they are for; the same bits on every backend and device.

    Args:
        shape: [B, …]; sample b's elements are numbered in row-major order, at most 2³⁴ of them.
        seed: 0 ≤ seed < 2⁶⁴; the samples are numbered sample_offset, sample_offset + 1, …
        seeds: one seed a sample, each sample then having number 0; not together with sample_offset.
        draw, stream: 0 ≤ draw, stream < 2³²; which noise of the sample (see fastdiff.noise).
        dtype: float32, or bfloat16 or float16, to which the float32 normals are rounded.
        memory_format: of the result; it does not change which element gets which normal.

    Raises:
        TypeError, ValueError: for arguments outside these ranges. RuntimeError: for a backend that cannot run here.
    """
    shape = check_shape("shape", shape)
    check_dtype("dtype", dtype)
    draw, stream = check_int("draw", draw, 0, (1 << 32) - 1), check_int("stream", stream, 0, (1 << 32) - 1)
    if memory_format is not torch.contiguous_format:
        ranks = {torch.channels_last: 4, torch.channels_last_3d: 5}
        if not isinstance(memory_format, torch.memory_format):
            raise TypeError(f"memory_format must be a torch.memory_format; got {type(memory_format).__name__}")
        if ranks.get(memory_format) != len(shape):
            raise ValueError(f"memory_format must be one of a tensor of {len(shape)} dimensions; got {memory_format}")
    target = check_device(device)
    key = noise_key(shape[0], target, seed, seeds, sample_offset)
    backend = "reference" if transformed() else choose(backend, target.type)
    out = torch.empty(shape, dtype=dtype, device=target, memory_format=memory_format)
    if traced(out):
        values: Tensor = torch.ops.fastdiff.randn(shape, *key.tensors(shape[0], target), draw, stream, dtype, backend)
        return values.contiguous(memory_format=memory_format)
    fill(out, key, draw, stream, backend)
    return out


def fill(out: Tensor, key: NoiseKey, draw: int, stream: int, backend: str) -> None:
    """Fill ``out`` [B, …] through one named backend, unchecked."""
    if backend == "native":
        from fastdiff.ops.randn import native_impl as impl
    elif backend == "triton":
        from fastdiff.ops.randn import triton_impl as impl  # type: ignore[no-redef]
    else:
        from fastdiff.ops.randn.reference import randn as reference

        out.copy_(reference(tuple(out.shape), *key.lists(len(out)), draw, stream, out.device))
        return
    impl.randn(out, key, draw, stream)


def _run(
    shape: Sequence[int], seeds: Tensor, samples: Tensor, draw: int, stream: int, dtype: torch.dtype, backend: str
) -> Tensor:
    out = torch.empty(tuple(shape), dtype=dtype, device=seeds.device)
    fill(out, NoiseKey(seeds=seeds.contiguous(), samples=samples.contiguous()), draw, stream, backend)
    return out


def _fake(
    shape: Sequence[int], seeds: Tensor, samples: Tensor, draw: int, stream: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=seeds.device)


register(
    "randn(SymInt[] shape, Tensor seeds, Tensor samples, int draw, int stream, ScalarType dtype, str backend) "
    "-> Tensor",
    _run,
    _fake,
)
