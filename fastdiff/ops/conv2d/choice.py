"""Which kernel computes a convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops import native, triton_support
from fastdiff.ops.conv2d import gemm, winograd
from fastdiff.ops.conv2d.geometry import Geometry
from fastdiff.ops.packed import onednn

PAD = ((1, 1), (1, 1))
# Products on a CPU up to which torch's own kernel was faster for one image: oneDNN takes 50 µs before it begins.
FEW = 1 << 21


def select(
    x: Tensor, weight: Tensor, geometry: Geometry, inputs: Sequence[Tensor], pointwise: Sequence[Tensor],
    residual: bool, exact: bool, backend: str,
) -> str:  # fmt: skip
    """"winograd", "gemm", "phases", "product" (of matrices), "blocked" (by oneDNN), "plain" (torch's own) or
    "reference".
    """
    if backend == "reference":
        return "reference"
    if backend in ("auto", "native"):
        if _by_winograd(x, weight, geometry, exact, backend == "native"):
            return "winograd"
        if backend == "native":
            raise RuntimeError(f"backend='native' cannot serve this conv2d: {_why_not_native(x)}")
    if backend in ("auto", "triton"):
        if _by_gemm(x, weight, geometry, inputs, pointwise, residual, exact, backend == "triton"):
            return "gemm"
        if backend == "triton":
            raise RuntimeError(f"backend='triton' cannot serve this conv2d: {_why_not_triton(x)}")
    pointwise = weight.shape[2:] == (1, 1) and geometry == Geometry()
    if geometry.upsample:
        summed = not exact and weight.shape[2:] == (3, 3) and geometry == Geometry(padding=PAD, upsample=True)
        # cuDNN's transposed convolution may add in any order, so that a result would not have the same bits twice.
        return "phases" if summed and x.device.type == "cpu" else "plain"
    if x.device.type != "cpu":
        return "product" if pointwise else "plain"
    rows, columns = geometry.size(x, weight)
    single = x.shape[0] == 1 and geometry.groups == 1  # of one image torch's own kernel unfolds the windows
    if not onednn(x) or geometry.symmetric is None or (single and rows * columns * weight.numel() <= FEW):
        return "plain"
    return "product" if pointwise and x.dtype == torch.float32 else "blocked"


def _by_winograd(x: Tensor, weight: Tensor, geometry: Geometry, exact: bool, named: bool) -> bool:
    if x.device.type != "cpu" or exact or geometry != Geometry(padding=PAD, upsample=geometry.upsample):
        return False
    if isinstance(native.extension(), str) or not winograd.computes(weight, x.dtype):
        return False
    return named or winograd.suits(x, weight, upsample=geometry.upsample)


def _by_gemm(
    x: Tensor, weight: Tensor, geometry: Geometry, inputs: Sequence[Tensor], pointwise: Sequence[Tensor],
    residual: bool, exact: bool, named: bool,
) -> bool:  # fmt: skip
    if (exact and geometry.upsample) or x.dtype not in native.DTYPES:
        return False
    if triton_support.why_missing(x.device.type) is not None or not gemm.computes(weight, geometry, pointwise):
        return False
    return named or gemm.suits(x, weight, geometry, inputs=inputs, residual=residual)


def _why_not_native(x: Tensor) -> str:
    if x.device.type != "cpu":
        return f"there is no native kernel for {x.device.type} devices"
    missing = native.extension()
    return missing if isinstance(missing, str) else "it is for 3×3 windows that keep the size, and not exact; see pack"


def _why_not_triton(x: Tensor) -> str:
    missing = triton_support.why_missing(x.device.type)
    return missing or f"it is for windows of 1×1 and 3×3 and channels that are a multiple of {gemm.STEP}"
