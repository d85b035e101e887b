"""Walking a plan row by row in float64."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

import fastdiff
from fastdiff.plan import SLOTS, Plan, Row


def walk(
    plan: Plan,
    x: Tensor,
    model: Callable[[Tensor, Row, int], Tensor],
    noises: Sequence[Tensor] | None = None,
    mend: Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None = None,
) -> Iterator[Tensor]:
    """The state after each row; the network is given c_in·x. ``mend`` may replace (x, anchor) after a row."""
    anchor, slots = None, [None] * SLOTS
    for i, row in enumerate(plan):
        noise = noises[i].to(x.dtype) if noises is not None and row.uses("z") else None
        out = fastdiff.ops.update(x, model(x * row.c_in, row, i), plan, i, anchor=anchor, slots=slots, noise=noise)
        x = out.x
        anchor = anchor if row.anchor is None else out.anchor
        if row.write is not None:
            slots[row.write] = out.slot
        if mend is not None:
            x, anchor = mend(i, x, anchor)
        yield x
