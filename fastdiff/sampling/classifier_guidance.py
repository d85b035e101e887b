"""Classifier guidance (Dhariwal & Nichol 2021, Algorithms 1 and 2): a plan's rows take in ∇ log p(y | x_t)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import kind_of
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row


@lru_cache(maxsize=32)
def guided_by_gradient(plan: Plan) -> Plan:
    """The plan whose every network call is guided by g = ∇ log p(y | x_t).

    A row that draws from a Gaussian of known variance (``Row.variance``: DDPM's) moves its mean by variance·g
    (Algorithm 1). In any other row ε̂ = ε − σ g (Algorithm 2), which is x̂_0 + σ²/α·g: all that the row makes of x̂_0 and
    m, the history in its slots too, is made of the moved ones. Clipping comes before g, and the x̂_0 that states show is
    the one before it. A row without signal (α = 0: a flow's first) stays as it is, since x_t says nothing of y there.

    Raises ValueError where a row reads a gradient already.
    """
    if plan.uses_gradient:
        raise ValueError(f"plan {plan.name!r} reads a gradient already")
    return replace(plan, rows=tuple(_guided(row) for row in plan))


def _guided(row: Row) -> Row:
    if not row.calls_model or (row.alpha == 0 and row.variance is None):
        return row
    if row.variance is not None:
        return replace(row, x={**row.x, "g": row.variance})
    x0 = row.sigma**2 / row.alpha
    m = x0 / row.q if row.q else 0.0  # x̂_0 = p x + q m moves by x0·g

    def moved(terms: Mapping[str, float] | None) -> Mapping[str, float] | None:
        return terms and {**terms, "g": terms.get("x0", 0.0) * x0 + terms.get("m", 0.0) * m}

    return replace(row, x=moved(row.x) or {}, anchor=moved(row.anchor), slot=moved(row.slot))


@dataclass(frozen=True)
class Classifier:
    """``cond_fn`` and its keywords."""

    cond_fn: Callable[..., Any]
    kwargs: Mapping[str, Any]

    def gradient(self, x: Tensor, times: Tensor, out: Tensor) -> None:
        """Write ``cond_fn(x, times, **kwargs)`` to ``out``, like x."""
        version = x._version
        with torch.enable_grad():
            g = self.cond_fn(x, times, **self.kwargs)
        if x._version != version:
            raise ValueError("cond_fn changed its x in place; it must not, since that is the sampler's state")
        if not isinstance(g, Tensor):
            raise TypeError(f"cond_fn must return a tensor; got {kind_of(g)}")
        if g.shape != x.shape or not g.is_floating_point() or g.device != x.device:
            raise ValueError(
                f"cond_fn must return a floating-point tensor of shape {list(x.shape)} on {x.device}; "
                f"got {g.dtype} {list(g.shape)} on {g.device}"
            )
        out.copy_(g.detach())
