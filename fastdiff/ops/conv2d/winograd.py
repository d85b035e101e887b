"""A 3×3 convolution with fewer multiplications: Winograd's F(2×2, 3×3) (Lavin & Gray 2016, arXiv:1509.09308).

Four results, 2×2, of 16 products instead of 36; of 9, where the image is first doubled by its nearest neighbours. Equal
in exact arithmetic; in floating point the transformed weights and images are rounded, and the sums of products have 2.8
times the result's variance. The kernel adds up channels in blocks, so that its root-mean-square error in float32 stays
at 2.4e-7 to 3.5e-7 of the result's standard deviation up to 1280 channels: between a quarter and 1.5 times that of
PyTorch's convolution, whose own depends on the CPU and the shape (tests/ops/test_conv2d_winograd.py derives the bound).
In bfloat16, whose transformed numbers are rounded before they are multiplied, one convolution has 1.8 times the
library's error with float32 weights and 2.5 times with weights that are bfloat16 themselves; whole networks stay at 0.8
to 1.1 times that of PyTorch's bfloat16. A number that is not finite spreads to the 4×4 window of
its tile, not the 3×3 one.

``winograd_conv`` says what is computed, in PyTorch and with gradients. On a CPU ``pack`` orders weights once for
``packed_winograd_conv``, which csrc/cpu/winograd_conv.cpp computes; ``suits`` says where that is faster than oneDNN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checks import check_image, check_operand
from fastdiff.ops import native

PANEL = 32  # features that the kernel computes at a time, as csrc/cpu/winograd_conv.cpp has them
WORDS = 16  # of 4 bytes, of channels that it reads at a time
# One dimension: products = (IMAGE @ 4 pixels) * (WEIGHT @ 3 weights), 2 results = RESULT @ 4 products.
IMAGE = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
WEIGHT = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
RESULT = ((1, 1, 1, 0), (0, 1, -1, -1))
DOUBLED = (0, 1, 3)  # the products that are not zero where the two inner pixels are the same


def winograd_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, upsample: bool = False
) -> Tensor:
    """conv2d(x, weight, bias, padding=1) + residual by Winograd's products, in PyTorch's operations and with gradients.

    Half precision is computed in float32 and rounded once.

    Args:
        x: [B, C, H, W], floating point; doubled first by its nearest neighbours if ``upsample``.
        weight: [N, C, 3, 3] of x's dtype and device.
        bias: [N] of float32 or x's dtype, or None.
        residual: [B, N, H, W] of x's dtype, [B, N, 2H, 2W] if ``upsample``, or None.

    Returns:
        The residual's shape, of x's dtype.

    Raises:
        TypeError: an argument that is not a tensor, x that is not floating point, dtypes that differ.
        ValueError: shapes or devices that do not fit.
    """
    check_image(x)
    features = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 4 else 0
    check_operand("weight", weight, x, (features, x.shape[1], 3, 3))
    _check_sums(x, features, bias, residual, upsample)
    wide = torch.promote_types(x.dtype, torch.float32)
    image, points, result = (torch.tensor(m, dtype=wide, device=x.device) for m in (IMAGE, WEIGHT, RESULT))
    padded = x.to(wide)
    if upsample:
        padded = F.interpolate(padded, scale_factor=2.0, mode="nearest")
    height, width = padded.shape[2:]
    padded = F.pad(padded, (1, 1 + width % 2, 1, 1 + height % 2))
    tiles = padded.unfold(2, 4, 2).unfold(3, 4, 2)  # [B, C, rows, columns, 4, 4]
    products = torch.einsum(
        "brsijc,nijc->brsnij", (image @ tiles @ image.T).movedim(1, -1), _transformed(weight.to(wide), points)
    )
    y = (result @ products @ result.T).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    y = y if bias is None else y + bias[:, None, None]
    y = y if residual is None else y + residual
    return y.to(x.dtype).contiguous()


def _transformed(weight: Tensor, points: Tensor) -> Tensor:
    """[N, C, 3, 3] to [N, 4, 4, C]."""
    return (points @ weight @ points.T).movedim(1, -1)


class Packed(NamedTuple):
    """Weights as ``pack`` leaves them, and what they belong to."""

    weights: Tensor  # float32 [panels, C, 9, 32], or of bfloat16 pairs, transformed: [panels, points, 2, C / 2, 16, 2]
    dtype: torch.dtype  # of the images
    channels: int
    features: int
    upsample: bool


def pack(weight: Tensor, *, upsample: bool = False, dtype: torch.dtype | None = None) -> Packed:
    """The weights as the kernel reads them, without gradients.

    They are transformed and rounded once to bfloat16 for images of that dtype where this CPU multiplies it: 0.89 times
    the bytes of float32 parameters, 0.5 where ``upsample``. Else they are the float32 weights themselves in another
    order, as many bytes, which the kernel transforms as it reads them.

    Args:
        weight: [N, C, 3, 3] on a CPU; N a multiple of 16, C of 16, or of 32 where bfloat16 is multiplied.
        upsample: for images that are doubled first.
        dtype: of the images: float32, bfloat16 or float16; the weight's own where None.

    Raises:
        ValueError: weights or a dtype that the kernel does not compute.
        RuntimeError: the compiled extension is missing.
    """
    dtype = weight.dtype if dtype is None else dtype
    if isinstance(native.extension(), str):
        raise RuntimeError(f"winograd_conv's kernel is missing: {native.extension()}")
    if not computes(weight, dtype):
        raise ValueError(
            f"weight must be [N, C, 3, 3] on a CPU, N a multiple of {WORDS} and C of {_step(dtype)}, for images of "
            f"float32, bfloat16 or float16; got {list(weight.shape)} on {weight.device} for {dtype}"
        )
    panels = (0, 0, 0, 0, 0, 0, 0, -len(weight) % PANEL)  # the last one is filled with zeros
    if _pairs(dtype):
        transform = torch.tensor(WEIGHT, dtype=torch.float64, device=weight.device)
        points = _transformed(F.pad(weight.detach().double(), panels), transform).flatten(1, 2)
        if upsample:
            points = points[:, [4 * i + j for i in DOUBLED for j in DOUBLED]]
        points = points.to(torch.bfloat16).unflatten(0, (-1, 2, PANEL // 2)).unflatten(4, (-1, 2))
        weights = points.permute(0, 3, 1, 4, 2, 5)  # of [panels, 2, 16, points, C / 2, 2]
    else:
        wide = F.pad(weight.detach().to(torch.float32), panels)
        weights = wide.flatten(2).unflatten(0, (-1, PANEL)).permute(0, 2, 3, 1)  # of [panels, 32, C, 9]
    return Packed(weights.contiguous(), dtype, weight.shape[1], weight.shape[0], upsample)


def packed_winograd_conv(
    x: Tensor, packed: Packed, bias: Tensor | None = None, *, residual: Tensor | None = None
) -> Tensor:
    """``winograd_conv`` by the kernel, without gradients; sums in float32, rounded once.

    Its bits depend neither on the number of threads nor on the other images of the batch.

    Args:
        x: [B, C, H, W] of the dtype that the weights were packed for.
        bias: [N] of float32 or that dtype.
        residual: [B, N, H, W] of that dtype, or as large as the doubled image.

    Returns:
        [B, N, H, W] or [B, N, 2H, 2W], channels_last.

    Raises:
        TypeError, ValueError: for what does not fit the packed weights.
        RuntimeError: gradients are wanted.
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"packed must come from pack(weight); got {type(packed).__name__}")
    weights, dtype, channels, features, up = packed
    check_image(x)
    if x.shape[1] != channels:
        raise ValueError(f"these weights are for {channels} channels; x has {x.shape[1]}")
    if x.dtype != dtype or x.device.type != "cpu":
        raise TypeError(f"these weights are for {dtype} on a CPU; x is {x.dtype} on {x.device}")
    shape = _check_sums(x, features, bias, residual, up)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, residual)):
        raise RuntimeError("packed_winograd_conv has no gradients: call winograd_conv, or use torch.no_grad()")
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    from fastdiff.ops.conv2d import winograd_native

    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    winograd_native.winograd_conv(out, x.contiguous(memory_format=torch.channels_last), weights, bias, residual, up)
    return out


def _check_sums(
    x: Tensor, features: int, bias: Tensor | None, residual: Tensor | None, upsample: bool
) -> tuple[int, ...]:
    """What is added to the convolution; the result's shape."""
    shape = (x.shape[0], features, *(size * (2 if upsample else 1) for size in x.shape[2:]))
    if bias is not None:
        check_operand("bias", bias, x, (features,), torch.float32)
    if residual is not None:
        check_operand("residual", residual, x, shape)
    return shape


def computes(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel computes a convolution with such weights, of images of ``dtype``."""
    if weight.ndim != 4 or weight.device.type != "cpu" or dtype not in native.DTYPES or weight.numel() == 0:
        return False
    return weight.shape[2:] == (3, 3) and weight.shape[0] % WORDS == 0 and weight.shape[1] % _step(dtype) == 0


def _pairs(dtype: torch.dtype) -> bool:
    """Whether products of bfloat16 serve images of ``dtype`` on this CPU."""
    return dtype == torch.bfloat16 and bool(native.bfloat16())


def _step(dtype: torch.dtype) -> int:
    return WORDS * (2 if _pairs(dtype) else 1)
