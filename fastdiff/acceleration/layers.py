"""Single layers but convolutions: packed projections, normalisations, and what must keep its own dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.acceleration.module import Context, Fast, Made


def onednn(x: Tensor) -> bool:
    """Whether torch's oneDNN kernels with packed weights serve x; they have no gradients."""
    if x.device.type != "cpu" or not x.numel() or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkldnn.enabled:
        return False
    if x.dtype == torch.float32:
        return True
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(x.dtype)
    return kind is not None and getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()


class Linear(Fast):
    """A projection; on the CPU with packed weights, by oneDNN."""

    does = "weights packed once"

    def __init__(self, module: nn.Linear, context: Context) -> None:
        super().__init__(module, context)
        self.project = Projection()

    def run(self, x: Tensor) -> Tensor:
        return self.project(x.to(self.dtype), [self.module.weight], [self.module.bias])


class Projection:
    """Linear layers that read the same x, as one: [..., K] -> [..., sum of their widths]."""

    def __init__(self) -> None:
        self._blocked: Made[Tensor] = Made()
        self._plain: Made[Tensor] = Made()
        self._bias: Made[Tensor | None] = Made()

    def __call__(self, x: Tensor, weights: list[Tensor], biases: list[Any]) -> Tensor:
        def bias() -> Tensor | None:
            if all(b is None for b in biases):
                return None
            zero = [torch.zeros(len(w), dtype=torch.float32, device=x.device) for w in weights]
            return torch.cat([z if b is None else b.float() for b, z in zip(biases, zero, strict=True)]).to(x.dtype)

        joined = self._bias.get(biases, bias)
        if not onednn(x):
            return F.linear(x, self._plain.get(weights, lambda: torch.cat(list(weights)).to(x.dtype)), joined)
        rows = x.reshape(-1, x.shape[-1])
        blocked = self._blocked.get(
            weights,
            lambda: torch.ops.mkldnn._reorder_linear_weight(
                torch.cat([w.detach() for w in weights]).to(x.dtype), len(rows)
            ),
        )
        y = torch.ops.mkldnn._linear_pointwise(rows, blocked, joined, "none", [], "")
        return y.view(*x.shape[:-1], y.shape[-1])


class GroupNorm(Fast):
    """GroupNorm, and SiLU after it where ``silu`` is set."""

    does = "one fused pass"
    silu = False

    @classmethod
    def refuses(cls, module: nn.GroupNorm) -> str | None:
        return None

    def run(self, x: Tensor) -> Tensor:
        return self.fused(x, silu=self.silu)

    def fused(self, x: Tensor, **more: Any) -> Tensor:
        m = self.module
        return ops.group_norm_silu(x.to(self.dtype), m.weight, m.bias, m.num_groups, m.eps, **more)


class LayerNorm(Fast):
    """LayerNorm in the network's dtype."""

    does = "in the network's dtype"

    def __init__(self, module: nn.LayerNorm, context: Context) -> None:
        super().__init__(module, context)
        self._cast: Made[list[Tensor | None]] = Made()

    def run(self, x: Tensor) -> Tensor:
        m = self.module
        pair = (m.weight, m.bias)
        weight, bias = self._cast.get(pair, lambda: [None if p is None else p.detach().to(self.dtype) for p in pair])
        return F.layer_norm(x.to(self.dtype), m.normalized_shape, weight, bias, m.eps)


class Passed(Fast):
    """A SiLU whose work the GroupNorm before it has done."""

    does = "done by the GroupNorm before it"

    def run(self, x: Tensor) -> Tensor:
        return x


class Foreign(Fast):
    """A module that is not known here and has parameters of its own: it computes in their dtype."""

    does = "not known: computed in its own dtype"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        own = next(p.dtype for p in self.module.parameters(recurse=False) if p.is_floating_point())
        out = self.original(*cast(args, own), **cast(kwargs, own))
        return cast(out, self.dtype)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in a structure of tuples, lists and dicts, cast."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(cast(v, dtype) for v in value)
    if type(value) is dict:
        return {k: cast(v, dtype) for k, v in value.items()}
    return value
