"""The fastdiff:: operators that torch.compile sees as one opaque call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("fastdiff", "DEF")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define fastdiff::<schema>, computed by ``run`` and shaped by ``fake``."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{name}", fake, lib=LIBRARY)


def traced(*tensors: object) -> bool:
    """Whether a call must go through its operator: where something records operations, or tensors are not plain.

    That is under torch.compile, torch.jit.trace, make_fx, and any other dispatch mode, which would not see what a
    kernel writes. An eager call on plain tensors runs the kernel directly, since the operator's boundary costs
    microseconds.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    return any(type(t) not in _PLAIN and isinstance(t, torch.Tensor) for t in tensors)


def transformed() -> bool:
    """Whether torch.func's transforms (vmap, jvp, grad) or forward-mode derivatives are active.

    They see PyTorch's own operations alone, so that a call runs its reference there.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))
