"""Attention through csrc/cpu/attention.cpp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.ops import native

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
COPIED = 16 << 20  # bytes of a head's keys and values in float32, which each thread keeps


def refusal(k: Tensor) -> str | None:
    """Why the kernel does not compute with such keys, or None."""
    if 8 * k.shape[2] * k.shape[3] > COPIED:
        return "it copies a head's keys and values in float32, 16 MiB of them at most"
    return None


def bind(q: Tensor, k: Tensor, v: Tensor, scale: float, empty: Callable[[Tensor], Tensor]) -> Call:
    """call(q, k, v) for tensors of these layouts, on a CPU and not empty; threads may share it. empty(q): a result."""
    module = native.extension()
    assert not isinstance(module, str)
    params = module.AttentionParams()
    params.batch, params.heads, params.queries, params.channels = q.shape
    params.keys, params.dtype, params.scale = k.shape[2], native.DTYPES[q.dtype], scale
    for name, t in (("q", q), ("k", k), ("v", v), ("out", empty(q))):
        setattr(params, name, module.Heads(t.data_ptr(), *_beside(t).stride()[:3]))
    run, threads = module.attention_cpu_at, torch.get_num_threads
    copies = any(_beside(t) is not t for t in (q, k, v))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if copies:
            q, k, v = _beside(q), _beside(k), _beside(v)
        out = empty(q)
        run(params, threads(), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        return out

    return call


def _beside(t: Tensor) -> Tensor:
    """The tensor, or a copy in which the channels of a head lie side by side."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()
