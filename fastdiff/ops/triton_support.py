"""Whether Triton can serve a device, and how its kernels are launched. Imports triton only to launch."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastdiff.noise import NoiseKey

# A program computes this many Philox quads of one sample: on a GPU 1024 elements by 4 warps, so that a thread has two
# 16-byte accesses in flight for each float32 tensor. The interpreter's cost is per program.
GPU_QUADS, INTERPRETER_QUADS, WARPS = 256, 65536, 4


def why_missing(device_type: str) -> str | None:
    """Why the Triton backend cannot serve a device type, or None where it can."""
    if not _installed():
        return "triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    if device_type == "cpu":
        return (
            "Triton has no CPU kernels; its interpreter runs where TRITON_INTERPRET=1 is set before fastdiff's import"
        )
    return f"there are no Triton kernels for {device_type!r} devices"


@lru_cache(maxsize=1)
def _installed() -> bool:
    """Asked in every call; a search of the path takes longer than a small kernel."""
    return find_spec("triton") is not None


def chip_here() -> str:
    """The current device's architecture: "sm_90", "gfx942", …"""
    import triton

    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def launch(kernel: Any, like: Tensor, *args: Any) -> None:
    """Run a kernel over the [B, n] elements of ``like`` on the current stream of its device.

    The grid is one-dimensional, B times the blocks of a sample. Contraction of multiply and add is always off.
    """
    import triton

    if not like.numel():
        return
    n = like.numel() // len(like)
    quads = GPU_QUADS
    if not isinstance(kernel, triton.JITFunction):
        quads = min(INTERPRETER_QUADS, triton.next_power_of_2(triton.cdiv(n, 4)))
    grid = (len(like) * triton.cdiv(n, 4 * quads),)
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        kernel[grid](*args, n=n, QUADS=quads, WIDE=n >= 1 << 31, num_warps=WARPS, enable_fp_fusion=False)


def key_arguments(key: NoiseKey) -> tuple[Tensor | None, Tensor | None, int, int]:
    """seeds, samples, seed (64 unsigned bits as int64) and sample_offset, in the order in which kernels take them."""
    seed = key.seed - (1 << 64) if key.seed >> 63 else key.seed
    return key.seeds, key.samples, seed, key.sample_offset
