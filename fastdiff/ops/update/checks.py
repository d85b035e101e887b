"""What ``update`` asks of its arguments, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import DTYPES, check_float32, check_shape
from fastdiff.ops.view import viewable
from fastdiff.plan.plan import COLUMNS, SLOTS, Plan, Row


def check_sequence(name: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{name} must be a tuple or list; got {type(values).__name__}")
    return tuple(values)


def check_state(x: Tensor, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 (or float64, for the reference); got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense; got {x.layout}")
    check_shape(f"{name}.shape", x.shape)
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous; got strides {x.stride()} for shape {list(x.shape)}")


def split_outputs(
    outputs: tuple[Tensor, ...],
    shape: Sequence[int],
    learned_variance: bool,
    device: torch.device,
    name: str,
    state_dtype: torch.dtype = torch.float32,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The network's outputs, checked and made walkable, with the learned variance (of the last) split off."""
    variance = None
    checked = []
    for output in outputs:
        if not isinstance(output, Tensor):
            raise TypeError(f"{name} must be tensors; got {type(output).__name__}")
        if output.dtype not in DTYPES and (output.dtype != torch.float64 or state_dtype != torch.float64):
            raise TypeError(f"{name} must be float32, bfloat16 or float16; got {output.dtype}")
        if output.layout != torch.strided:
            raise TypeError(f"{name} must be dense; got {output.layout}")
        if output.device != device:
            raise ValueError(f"{name} must be on the state's device {device}; got {output.device}")
        if learned_variance and output.ndim >= 2 and output.shape[1] == 2 * shape[1]:
            output, variance = output.split(shape[1], dim=1)
            variance = viewable(variance)
        if output.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}; got {list(output.shape)}{_hint(output, shape)}")
        checked.append(viewable(output))
    if learned_variance and outputs and variance is None:
        raise ValueError(f"{name} must have {2 * shape[1]} channels under learned variance; got {shape[1]}")
    return tuple(checked), variance


def _hint(output: Tensor, shape: Sequence[int]) -> str:
    twice = output.ndim == len(shape) >= 2 and output.shape[1] == 2 * shape[1]
    if not twice:
        return ""
    return (
        " (twice the channels: variance='learned_range' says that the second half is a learned variance, which other "
        "samplers than ddpm leave unread; a Plan has learned_variance=True)"
    )


def check_guidance(guidance: Sequence[float], outputs: int) -> tuple[float, ...]:
    if len(guidance) == 0 and outputs < 2:
        return ()
    weights = tuple(check_float32(f"guidance[{i}]", w) for i, w in enumerate(guidance))
    if outputs > 3:
        raise ValueError(f"at most three outputs can be guided; got {outputs}")
    if (outputs > 1) != (len(weights) > 0) or (len(weights) > 0 and len(weights) != outputs):
        raise ValueError(f"guidance must hold one weight for each of several outputs; got {len(weights)} for {outputs}")
    return weights


# The columns that say what a row is; the others are numbers, which may be learned.
_KINDS = [COLUMNS.index(name) for name in ("read0", "read1", "read2", "write", "keeps_anchor", "draw", "stream",
                                           "calls_model")]  # fmt: skip


def check_table(table: Any, plan: Plan) -> Tensor:
    """Numbers in place of a plan's own; a copy where they have no gradient, since a table is remembered by identity."""
    if not isinstance(table, Tensor) or table.dtype != torch.float64 or table.device.type != "cpu":
        got = f"{table.dtype} on {table.device}" if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"table must be a float64 tensor on the CPU; got {got}")
    if table.shape != (len(plan), len(COLUMNS)):
        raise ValueError(f"table must have shape {[len(plan), len(COLUMNS)]}; got {list(table.shape)}")
    if not torch.equal(table.detach()[:, _KINDS], plan.table()[:, _KINDS]):
        raise ValueError("table must have the plan's slots, writes, noise addresses and network calls")
    return table if table.requires_grad else table.clone()


_FROM_OUTSIDE = frozenset(("anchor", "slot0", "slot1", "slot2", "g"))


def check_given(x: Tensor, r: Row, row: int, given: dict[str, Tensor], slots: int) -> None:
    if slots != SLOTS:
        raise ValueError(f"slots must have {SLOTS} entries; got {slots}")
    if not given and not r.reads_terms & _FROM_OUTSIDE:
        return
    shapes = {"gain": x.shape[:1], "clip": (*x.shape[:1], 2)}
    for name, tensor in given.items():
        shape = shapes.get(name, x.shape)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be dense; got {tensor.layout}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"{name} must be {x.dtype} on {x.device}; got {tensor.dtype} on {tensor.device}")
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous of shape {list(shape)}; got {list(tensor.shape)}")
    if ("mask" in given) != ("known" in given):
        raise ValueError("mask and known go together: give both or neither")
    if "anchor" not in given and r.uses("anchor"):
        raise ValueError(f"row {row} reads the anchor, which was not given")
    if "gradient" not in given and r.uses("g"):
        raise ValueError(f"row {row} reads the gradient, which was not given")
    for k, slot in enumerate(r.reads):
        if r.uses(f"slot{k}") and f"slots[{slot}]" not in given:
            raise ValueError(f"row {row} reads slot {slot}, which was not given")
