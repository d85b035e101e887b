"""The fastdiff:: operators that torch.compile sees as one opaque call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastdiff", "DEF")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define fastdiff::<schema>, computed by ``run`` and shaped by ``fake``."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{name}", fake, lib=LIBRARY)


def traced(*tensors: object) -> bool:
    """Whether a call must go through its operator: under torch.compile, or on tensors that are not plain.

    An eager call on plain tensors runs the kernel directly, since the operator's boundary costs microseconds.
    """
    if torch.compiler.is_compiling():
        return True
    return any(type(t) not in _PLAIN and isinstance(t, torch.Tensor) for t in tensors)


_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))
