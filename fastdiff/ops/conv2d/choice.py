"""Which kernel computes a convolution: what each of them can, and the facts that choice.json speaks of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops import backend as backends
from fastdiff.ops import native
from fastdiff.ops.conv2d import gemm, winograd
from fastdiff.ops.conv2d.geometry import Geometry
from fastdiff.ops.packed import onednn

PAD = ((1, 1), (1, 1))
KERNELS = {
    "winograd": "native", "gemm": "triton", "phases": "torch", "product": "torch", "blocked": "torch",
    "plain": "torch", "reference": "reference",
}  # fmt: skip


def select(
    x: Tensor, weight: Tensor, geometry: Geometry, inputs: Sequence[Tensor], pointwise: Sequence[Tensor],
    residual: bool, exact: bool, backend: str,
) -> str:  # fmt: skip
    """One of KERNELS, for arguments as ``conv2d`` has them."""

    def refusal(kernel: str) -> str | None:
        return None if _computes(kernel, x, weight, geometry, pointwise, exact) else REASONS[kernel]

    facts = facts_of(x, weight, geometry, len(inputs), residual)
    return backends.select("conv2d", backend, x.device, facts, KERNELS, refusal)


REASONS = {
    "winograd": "it is for 3×3 windows that keep the size, not exact, features that are a multiple of 16, and channels",
    "gemm": f"it is for windows of 1×1 and 3×3 pixels, and channels that are a multiple of {gemm.STEP}",
    "phases": "it is for doubled images and 3×3 windows on a CPU, not exact",
    "product": "it is for windows of one pixel",
    "blocked": "oneDNN does not serve it",
}


def _computes(
    kernel: str, x: Tensor, weight: Tensor, geometry: Geometry, pointwise: Sequence[Tensor], exact: bool
) -> bool:
    keeps = weight.shape[2:] == (3, 3) and geometry == Geometry(padding=PAD, upsample=geometry.upsample)
    if kernel == "winograd":
        return keeps and not exact and x.device.type == "cpu" and winograd.computes(weight, x.dtype)
    if kernel == "gemm":
        summed = exact and geometry.upsample
        return not summed and x.dtype in native.DTYPES and gemm.computes(weight, geometry, pointwise)
    if kernel == "phases":
        # cuDNN's transposed convolution may add in any order, so that a result would not have the same bits twice.
        return keeps and geometry.upsample and not exact and x.device.type == "cpu"
    if kernel == "product":
        return weight.shape[2:] == (1, 1) and geometry == Geometry()
    if kernel == "blocked":
        return onednn(x) and geometry.symmetric is not None and not geometry.upsample
    return True


def facts_of(x: Tensor, weight: Tensor, geometry: Geometry, inputs: int, residual: bool) -> dict[str, float]:
    """The numbers of a call that choice.json's bounds speak of."""
    batch, _, height, width = x.shape
    rows, columns = geometry.size(x, weight)
    pixels, features = batch * rows * columns, len(weight)
    tiles = (height + 1) // 2 * ((width + 1) // 2)
    matrix = x.dtype == torch.bfloat16 and native.bfloat16() == "matrix"
    return {
        "bits": 8 * x.element_size(), "batch": batch, "groups": geometry.groups, "stride": geometry.stride[0],
        "upsample": geometry.upsample, "inputs": inputs, "residual": residual, "numbers": pixels * features,
        "products": pixels * weight.numel(), "narrow": min(weight.shape[:2]), "tiles": tiles,
        "share": 16 * tiles / (9 * height * width), "matrix": matrix,
    }  # fmt: skip


def suits_winograd(x: Tensor, weight: Tensor, *, upsample: bool = False) -> bool:
    """Whether choice.json takes Winograd's kernel for a 3×3 convolution of such images."""
    return select(x, weight, Geometry(padding=PAD, upsample=upsample), (), (), False, False, "auto") == "winograd"
