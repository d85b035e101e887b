"""Nearest-neighbour ×2 followed by a 3×3 convolution, on the small grid: 4/9 of the multiplications.

Of a 3×3 window on the doubled grid, two rows and two columns (or one and one) repeat the same pixel, so each of the
four phases of the output is a 2×2 convolution of the input. Together they are one transposed convolution of stride 2
and padding 1: in one dimension, with u[j] = x[j // 2] and y[o] = w0 u[o − 1] + w1 u[o] + w2 u[o + 1],

    y[2i] = w0 x[i − 1] + (w1 + w2) x[i],    y[2i + 1] = (w0 + w1) x[i] + w2 x[i + 1],

which is Σ_i x[i] T[o − 2i + 1] with T = [w2, w1 + w2, w0 + w1, w0]; in two dimensions both axes are summed so. Equal in
exact arithmetic; in floating point the summed weights are rounded, and fewer products added.
"""

from __future__ import annotations

import torch
from torch import Tensor

# conv_transpose2d's arguments, as oneDNN's packed form takes them: padding, output padding, stride, dilation.
GEOMETRY = ([1, 1], [0, 0], [2, 2], [1, 1])


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


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor; got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point; got {weight.dtype}")
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        raise ValueError(f"weight must have the shape [Cout, Cin, 3, 3]; got {list(weight.shape)}")
