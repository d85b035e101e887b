"""What a run hands out after a row, and takes to go on from there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class State:
    """The state of a run before its first row or after a row: what ``resume=`` needs to go on, to the bit.

    Attributes:
        x: float32 [B, …].
        x0: the row's x̂_0, like x; None before the first row.
        anchor: the saved x, or None where the plan has none.
        slots: the history: four entries, tensors or None.
        row: the number of the plan's next row.
    """

    x: Tensor
    x0: Tensor | None
    anchor: Tensor | None
    slots: tuple[Tensor | None, ...]
    row: int
