"""A group normalisation and its SiLU in PyTorch, the Σ|terms| that rounding is measured by, and the comparison."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from helpers import assert_accurate
from torch import Tensor

FEW = 20_000  # elements, below which PyTorch's largest error is a matter of luck
# Of float32's arithmetic, in whatever order: x + add; the sum and the mean; their difference; the variance's root, and
# the sum below it; that times the weight; the product with the difference; the bias. SiLU's own (e^−y, its sum, the
# quotient) are fewer and of another part of ``magnitude``.
ROUNDINGS = 9


def textbook(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float = 1e-5, x2: Tensor | None = None,
    add: Tensor | None = None, silu: bool = True, dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """PyTorch's own operations in one dtype."""
    h = (x if x2 is None else torch.cat([x, x2], 1)).to(dtype)
    if add is not None:
        h = h + add.to(dtype).reshape(-1 if add.ndim == 2 else 1, h.shape[1], *[1] * (h.ndim - 2))
    y = F.group_norm(h, groups, *(None if v is None else v.to(dtype) for v in (weight, bias)), eps)
    return F.silu(y) if silu else y


def assert_right(got: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, **options) -> None:
    """At most twice PyTorch's largest error, of few elements its largest in nine calls of inputs in other units; or in
    float32 what the formula's roundings explain, and in half precision the result's own.
    """
    assert got.dtype == x.dtype
    exact = textbook(x, weight, bias, groups, **options)

    def error(factor: float) -> Tensor:
        scaled = {k: v * factor if isinstance(v, Tensor) else v for k, v in options.items()}
        theirs, right = (
            textbook(x * factor, weight, bias, groups, **scaled, dtype=d) for d in (x.dtype, torch.float64)
        )
        return (theirs.double() - right).abs().amax()

    if exact.numel():
        factors = [1.0] + [random.uniform(1, 2) for _ in range(8 if exact.numel() < FEW else 0)]
        theirs = exact + torch.stack([error(f) for f in factors]).amax()
    else:
        theirs = exact
    size = magnitude(x, weight, bias, groups, **options)
    assert_accurate(got, exact, theirs, size, roundings=ROUNDINGS if got.dtype == torch.float32 else 0)


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
