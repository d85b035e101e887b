"""Nearest-neighbour ×2 followed by a 3×3 convolution, on the small grid: 4/9 of the multiplications.

Of a 3×3 window on the doubled grid, two rows and two columns (or one and one) repeat the same pixel, so each of the
four phases of the output is a 2×2 convolution of the input. Together they are one transposed convolution of stride 2
and padding 1: in one dimension, with u[j] = x[j // 2] and y[o] = w0 u[o − 1] + w1 u[o] + w2 u[o + 1],

    y[2i] = w0 x[i − 1] + (w1 + w2) x[i],    y[2i + 1] = (w0 + w1) x[i] + w2 x[i + 1],

which is Σ_i x[i] T[o − 2i + 1] with T = [w2, w1 + w2, w0 + w1, w0]; in two dimensions both axes are summed so. Equal in
exact arithmetic; in floating point the summed weights are rounded, and fewer products added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, interpolate

from fastdiff.checks import check_image, check_operand

# conv_transpose2d's arguments, as oneDNN's packed form takes them: padding, output padding, stride, dilation.
GEOMETRY = ([1, 1], [0, 0], [2, 2], [1, 1])


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1), gradients included.

    The weights are summed in every call, which costs as much as the convolution of a small image: where they stay the
    same, ``pack`` them once and call ``packed_upsample_conv``.

    Args:
        x: [B, Cin, H, W], floating point; channels_last is kept.
        weight: [Cout, Cin, 3, 3] of x's dtype and device.
        bias: [Cout], likewise, or None.
        exact: do the two steps as they stand.

    Returns:
        [B, Cout, 2H, 2W] of x's dtype.

    Raises:
        TypeError: an argument that is not a tensor, x that is not floating point, dtypes that differ.
        ValueError: shapes or devices that do not fit.
    """
    check_image(x)
    _check_weight(weight)
    check_operand("weight", weight, x, (weight.shape[0], x.shape[1], 3, 3))
    if bias is not None:
        check_operand("bias", bias, x, (weight.shape[0],))
    if exact:
        return conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    return conv_transpose2d(x, presum(weight), bias, stride=2, padding=1)


def presum(weight: Tensor) -> Tensor:
    """T of the formula above, as conv_transpose2d takes it: [Cout, Cin, 3, 3] to [Cin, Cout, 4, 4].

    The sums are float32 (float64 for float64), rounded once to the weight's dtype.
    """
    _check_weight(weight)
    wide = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
    return _spread(_spread(wide.transpose(0, 1), 2), 3).to(weight.dtype)


def _spread(w: Tensor, dim: int) -> Tensor:
    w0, w1, w2 = w.unbind(dim)
    return torch.stack((w2, w1 + w2, w0 + w1, w0), dim)


class Packed(NamedTuple):
    """Summed weights as ``pack`` leaves them: in oneDNN's own order, or as conv_transpose2d takes them."""

    weight: Tensor
    c_in: int
    c_out: int
    onednn: bool  # said here, since torch.compile does not see it in the tensor


def pack(weight: Tensor, input_shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Packed:
    """The summed weights in the order that the convolution wants, for ``packed_upsample_conv``; without gradients.

    They are rounded to ``dtype``, the weight's own where None, after the sums.

    On a CPU it is oneDNN's, laid out for inputs of ``input_shape`` [B, Cin, H, W] (other sizes work, less quickly);
    elsewhere, and in a dtype that oneDNN lacks on this CPU, the weights are ``presum(weight)``.
    """
    summed = presum(weight.detach())
    summed = summed if dtype is None else summed.to(dtype)
    c_in, c_out = summed.shape[:2]
    if len(input_shape) != 4 or input_shape[1] != c_in:
        raise ValueError(f"input_shape must be [B, {c_in}, H, W]; got {list(input_shape)}")
    onednn = _onednn_takes(summed)
    if onednn:
        summed = torch.ops.mkldnn._reorder_convolution_transpose_weight(summed, *GEOMETRY, 1, list(input_shape))
    return Packed(summed, c_in, c_out, onednn)


def packed_upsample_conv(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """``upsample_conv`` with weights of ``pack``, without gradients; channels_last comes out where they are oneDNN's.

    Raises:
        TypeError, ValueError: as ``upsample_conv``.
        RuntimeError: gradients are wanted.
    """
    check_image(x)
    if not isinstance(packed, Packed):
        raise TypeError(f"packed must come from pack(weight, input_shape); got {type(packed).__name__}")
    weight, c_in, c_out, onednn = packed
    if c_in != x.shape[1]:
        raise ValueError(f"packed is for {c_in} input channels; x has {x.shape[1]}")
    if weight.dtype != x.dtype:
        raise TypeError(f"packed.weight must have x's dtype {x.dtype}; got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"packed.weight must be on x's device {x.device}; got {weight.device}")
    if bias is not None:
        check_operand("bias", bias, x, (c_out,))
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise RuntimeError("packed_upsample_conv has no gradients: call upsample_conv, or use torch.no_grad()")
    if not onednn:
        return conv_transpose2d(x, weight, bias, stride=2, padding=1)
    return torch.ops.mkldnn._convolution_transpose_pointwise(x, weight, bias, *GEOMETRY, 1, "none", [], "")


def _onednn_takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or weight.numel() == 0:
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor; got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point; got {weight.dtype}")
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        raise ValueError(f"weight must have the shape [Cout, Cin, 3, 3]; got {list(weight.shape)}")
