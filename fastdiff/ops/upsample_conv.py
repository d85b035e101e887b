"""Nearest-neighbour ×2 followed by a 3×3 convolution, on the small grid: 4/9 of the multiplications.

The step that doubles the resolution in the DDPM UNet (Ho et al. 2020, Appendix B). On the doubled grid a 3×3 window
covers 2×2 pixels only, so each of the four phases of the output is a 2×2 convolution of the input. Together they are a
transposed convolution of stride 2 and padding 1: in one dimension, y[o] = w0 u[o − 1] + w1 u[o] + w2 u[o + 1] with
u[j] = x[⌊j / 2⌋] is

    y[2i] = w0 x[i − 1] + (w1 + w2) x[i],    y[2i + 1] = (w0 + w1) x[i] + w2 x[i + 1],

which is y[o] = Σ_i x[i] T[o − 2i + 1] with T = [w2, w1 + w2, w0 + w1, w0]; in two dimensions both axes are summed so.
Equal in exact arithmetic; in floating point the sums of weights are rounded, and fewer products are added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, interpolate

from fastdiff.ops.randn import DTYPES


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1), gradients included.

    Args:
        x: [B, Cin, H, W] of float32, bfloat16 or float16, of any strides.
        weight: [Cout, Cin, 3, 3] of x's dtype, summed in every call (see ``presum``).
        bias: [Cout] of x's dtype.
        exact: run the two steps as they stand, to their bits.

    Returns:
        [B, Cout, 2H, 2W] of x's dtype.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument of another shape or device.
    """
    _check_weight(weight)
    _check("x", x, weight, ("B", weight.shape[1], "H", "W"))
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have pixels; got {list(x.shape)}")
    if bias is not None:
        _check("bias", bias, weight, (weight.shape[0],))
    if not isinstance(exact, bool):
        raise TypeError(f"exact must be a bool; got {type(exact).__name__}")
    if exact:
        return conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    return conv_transpose2d(x, _presum(weight), bias, stride=2, padding=1)


def presum(weight: Tensor) -> Tensor:
    """The kernel of the transposed convolution of stride 2 and padding 1 (T above).

    Args:
        weight: [Cout, Cin, 3, 3] of float32, bfloat16 or float16.

    Returns:
        [Cin, Cout, 4, 4], summed in float32 and rounded once to weight's dtype. Gradients flow to weight.

    Raises:
        TypeError: weight is no dense tensor of these dtypes.
        ValueError: weight is of another shape.
    """
    _check_weight(weight)
    return _presum(weight)


def _presum(weight: Tensor) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32)).transpose(0, 1)
    return _spread(_spread(wide, 2), 3).to(weight.dtype)


def _spread(w: Tensor, dim: int) -> Tensor:
    w0, w1, w2 = w.unbind(dim)
    return torch.stack((w2, w1 + w2, w0 + w1, w0), dim)


def _check_weight(weight: Tensor) -> None:
    _check_dense("weight", weight)
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be float32, bfloat16 or float16; got {weight.dtype}")
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        raise ValueError(f"weight must have the shape [Cout, Cin, 3, 3]; got {list(weight.shape)}")


def _check(name: str, tensor: Tensor, weight: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raise for what does not go with ``weight``; a letter in ``shape`` stands for any size."""
    _check_dense(name, tensor)
    if tensor.dtype != weight.dtype:
        raise TypeError(f"{name} must have weight's dtype {weight.dtype}; got {tensor.dtype}")
    if tensor.ndim != len(shape) or any(
        isinstance(size, int) and size != got for size, got in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name} must have the shape [{', '.join(map(str, shape))}]; got {list(tensor.shape)}")
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on weight's device {weight.device}; got {tensor.device}")


def _check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got {tensor.layout}")
