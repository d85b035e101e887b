"""Σ|terms| of a group normalisation and its SiLU: what their rounding is measured by."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, *, eps: float = 1e-5,
    x2: Tensor | None = None, add: Tensor | None = None, silu: bool = True,
) -> Tensor:  # fmt: skip
    """Float64, in the result's shape.

    The terms of x + add − mean count up to four standard deviations beyond the difference: a mean far above them is no
    excuse. SiLU passes y's rounding on by its derivative, and adds its own: of e^−y, relative to 1 + |y|.
    """
    whole = (x if x2 is None else torch.cat([x, x2], 1)).double()
    shape = (-1, whole.shape[1], *[1] * (whole.ndim - 2))
    shift = torch.zeros(()) if add is None else add.double().reshape(shape)
    w, b = (torch.tensor(float(v is None and k == 0)) if v is None else v.double().reshape(shape)
            for k, v in enumerate((weight, bias)))  # fmt: skip
    h = whole + shift
    grouped = h.reshape(len(h), groups, -1)
    variance, mean = (
        t.expand_as(grouped).reshape(h.shape) for t in torch.var_mean(grouped, 2, correction=0, keepdim=True)
    )
    rstd = (variance + eps).rsqrt()
    d = h - mean
    terms = torch.minimum(whole.abs() + shift.abs() + mean.abs(), d.abs() + 4 * variance.sqrt())
    size = torch.maximum(terms, d.abs()) * rstd * w.abs() + b.abs()
    if not silu:
        return size
    y = d * rstd * w + b
    sigmoid = torch.sigmoid(y)
    return size * (sigmoid * (1 + y * (1 - sigmoid))).abs() + (y * sigmoid).abs() * (1 + y.abs() * (1 - sigmoid))
