"""A run with gradients: the network and the update of every row, with one row's activations in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdiff.ops.update import update
from fastdiff.ops.update.checks import split_outputs
from fastdiff.plan.plan import COLUMNS
from fastdiff.plan.row import SLOTS
from fastdiff.sampling.guidance import P, Q, mixed, row_outputs
from fastdiff.sampling.model import first_tensor
from fastdiff.sampling.request import Request
from fastdiff.tuning.units import OF_X, Moments, terms_of

T, NEXT_C_IN = COLUMNS.index("t"), COLUMNS.index("next_c_in")
WEIGHTS = slice(COLUMNS.index("w0"), COLUMNS.index("w2") + 1)


def walk(
    request: Request, table: Tensor, look: Callable[[int, Callable[[Tensor], Tensor]], None] | None = None
) -> Tensor:
    """The last state [B, …], float32, of a request's plan whose numbers are ``table``'s, with gradients by them.

    Only the states between rows are kept, and the outputs that rows take again; a row is run again where its gradient
    is wanted. Guidance rescale's factors and dynamic thresholding's bounds, each of a whole image, are constants to the
    gradient. ``look(row, written)`` is called after each row: written(table) is the x' that another table would write.
    """
    plan, guidance = request.plan, request.guidance
    weights = plan.table(guidance.weights)[:, WEIGHTS]
    table = torch.cat([table[:, : WEIGHTS.start], weights, table[:, WEIGHTS.stop :]], 1)
    counts = row_outputs(plan, guidance.outputs, guidance.weights)
    x, anchor, slots = request.x, None, [None] * SLOTS
    last: list[Any] = []  # the outputs of the last call, where rows take them again
    c_in: Any = plan[0].c_in

    def step(i: int, c_in: Any, table: Tensor, x: Tensor, anchor: Any, *rest: Any) -> tuple[Any, ...]:
        slots, last = rest[:SLOTS], rest[SLOTS:]
        if plan[i].runs_network:
            outputs = _outputs(request, x * c_in, table[i, T], counts[i], plan.integer_timesteps)
            last = outputs if plan.reused else ()
        else:
            outputs = last[len(last) - counts[i] :]  # the conditional one is the last
        beside = _of_image(request, outputs, table[i], x)

        def written_by(table: Tensor) -> Any:
            return update(
                x, outputs, plan, i, table=table, guidance=_row_weights(request, i, len(outputs)), anchor=anchor,
                slots=slots, **beside,
            )  # fmt: skip

        written = written_by(table)
        if look is not None:
            look(i, lambda other: written_by(other).x)
        return written.x, written.anchor, written.slot, *last

    for i, row in enumerate(plan):
        x, kept, left, *last = checkpoint(
            step, i, c_in, table, x, anchor, *slots, *last, use_reentrant=False, preserve_rng_state=False
        )  # fmt: skip
        anchor = anchor if kept is None else kept
        if row.write is not None:
            slots[row.write] = left
        c_in = table[i, NEXT_C_IN].to(x.device, torch.float32)
    return x


def measured(request: Request, table: Tensor, units: Tensor) -> dict[int, Moments]:
    """What the rows of a run write, and their terms, without gradients."""
    found = {}

    def look(i: int, written: Callable[[Tensor], Tensor]) -> None:
        terms = []
        for column in terms_of(units, i):
            alone = table.clone()
            alone[i, OF_X] = 0
            alone[i, column] = 1
            terms.append(written(alone).double().flatten())
        products = torch.stack(terms) @ torch.stack(terms).T / terms[0].numel()
        moments = Moments(float(written(table).double().square().mean().sqrt()), products.cpu())
        if moments.written > 0 and math.isfinite(moments.written) and bool(products.isfinite().all()):
            found[i] = moments

    with torch.no_grad():
        walk(request, table, look)
    return found


def outputs_at(request: Request, x: Tensor, t: Tensor, row: int, as_float: bool = False) -> tuple[Tensor, ...]:
    """The network's outputs at a state, as a row of the plan calls it, told any t [], of either kind."""
    plan, guidance = request.plan, request.guidance
    count = row_outputs(plan, guidance.outputs, guidance.weights)[row]
    return _outputs(request, x * plan[row].c_in, t, count, plan.integer_timesteps and not as_float)


def _outputs(request: Request, x: Tensor, t: Tensor, count: int, whole: bool) -> tuple[Tensor, ...]:
    """The network's outputs for an input [B, …], ``count`` of them, as the sampling loop calls it."""
    if count == 0:
        return ()
    network, guidance = request.network, request.guidance
    keywords = guidance.calls if count > 1 else (guidance.plain,)
    stacked = count if count > 1 and len(keywords) == 1 else 1
    x = x.to(network.dtype).contiguous(memory_format=network.layout)
    if stacked > 1:
        x = torch.cat([x] * stacked)
    times = t.to(network.device, torch.int64 if whole else torch.float32).expand(len(x))
    outs = [_called(network.model, x, times, of_call) for of_call in keywords]
    return tuple(outs[0].chunk(stacked)) if stacked > 1 else tuple(outs)


def _called(model: Any, x: Tensor, times: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    out = model(x, times, **keywords)
    return out if isinstance(out, Tensor) else first_tensor(out)


def _row_weights(request: Request, i: int, outputs: int) -> tuple[float, ...]:
    if outputs < 2:
        return ()
    weights = request.guidance.weights
    return tuple(weights[i] if isinstance(weights[0], tuple) else weights)


def _of_image(request: Request, outputs: tuple[Tensor, ...], row: Tensor, x: Tensor) -> dict[str, Any]:
    """What a row needs to know of each image as a whole, without a gradient, as ``Stepper.reduce`` has it."""
    guidance, thresholding = request.guidance, request.thresholding
    if not outputs or not (guidance.rescale or thresholding is not None):
        return {}
    with torch.no_grad():
        numbers = row.detach().to(x.device, torch.float32)
        halves, _ = split_outputs(outputs, x.shape, request.plan.learned_variance, x.device, "the model's outputs")
        m, found = mixed(halves, numbers), {}
        if guidance.rescale:
            found["gain"] = torch.ones(len(x), dtype=torch.float32, device=x.device)
            if len(halves) > 1:
                guidance.gain(mixed(halves[-1:], numbers), m, found["gain"])
            m = m * found["gain"][:, None]
        if thresholding is not None:
            found["clip"] = torch.ones(len(x), 2, dtype=torch.float32, device=x.device)
            thresholding.bounds(x.view(len(x), -1) * numbers[P] + m * numbers[Q], found["clip"])
    return found
