"""Rows that take an earlier call's output or deep features (``Plan.reuse``): what a run checks, keeps and asks.

A network is asked for its deep features by a function of one protocol, ``DeepCalls``. A network of one's own offers it
as a method ``forward_deep``; of a UNet that was accelerated, ``acceleration.deep`` has it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.plan.plan import Plan
from fastdiff.plan.reuse import sources
from fastdiff.sampling.accelerated import accelerated_deep_calls
from fastdiff.sampling.guidance import Guidance, row_outputs


class DeepCalls(Protocol):
    """A call of the network that keeps its deep features, or takes those of an earlier call."""

    def __call__(self, x: Tensor, t: Tensor, deep: Tensor | None, **kwargs: Any) -> tuple[Any, Tensor]:
        """(what ``model(x, t, **kwargs)`` returns, its deep features [len(x), …]) where ``deep`` is None; else the same
        of the shallow layers alone, with the given features, [len(x), …], in the place of all that lies deeper.
        """


def deep_calls(model: Any, branch: int) -> DeepCalls:
    """How a network is asked for deep features of a skip branch; ValueError where it does not offer any."""
    own = getattr(model, "forward_deep", None)
    if callable(own):

        def call(x: Tensor, t: Tensor, deep: Tensor | None, **kwargs: Any) -> tuple[Any, Tensor]:
            result: tuple[Any, Tensor] = own(x, t, deep, branch, **kwargs)
            if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Tensor):
                raise TypeError("forward_deep must return a pair: the output, and the deep features as a tensor")
            return result

        return call
    return accelerated_deep_calls(model, branch)


def check_reuse(plan: Plan, guidance: Guidance) -> None:
    """ValueError where a guided row would reuse a call that was not."""
    counts = row_outputs(plan, guidance.outputs, guidance.weights)
    for i, source in enumerate(sources(plan.rows)):
        if source is not None and counts[i] > counts[source]:
            raise ValueError(
                f"row {i} is guided and reuses row {source}, which is not (its guidance_scale is 1, or it is outside "
                "of guidance_interval): the unconditional output was not computed there"
            )


def kept_output(plan: Plan, guidance: Guidance, x: Tensor) -> Tensor:
    """Where a run of states like x keeps the network's outputs: float32 [outputs·B, …]."""
    shape = list(x.shape)
    shape[0] *= guidance.outputs
    if plan.learned_variance:
        shape[1] *= 2
    return torch.zeros(shape, dtype=torch.float32, device=x.device)


def kept_deep(before: Tensor | None, features: Tensor, begin: int, count: int, total: int) -> Tensor:
    """The kept features [total, …] with those of a call [count, …] written into them from entry ``begin`` on.

    They are the same memory for a whole run, which a captured step relies on.
    """
    if features.ndim == 0 or len(features) != count:
        raise ValueError(f"deep features must be [{count}, …], an entry a sample; got {list(features.shape)}")
    if before is None:
        channels_last = features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        shape = (total, *features.shape[1:])
        before = torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=layout).zero_()
    part = before[begin : begin + count]
    if features.shape != part.shape or features.dtype != part.dtype:
        raise ValueError(
            f"deep features must be {part.dtype} {list(part.shape)}, as in the run's first call; "
            f"got {features.dtype} {list(features.shape)}"
        )
    part.copy_(features)
    return before
