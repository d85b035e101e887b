"""What is learned of a plan: its levels, the t that the network is told, and the coefficients of every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.plan.plan import COLUMNS, Plan
from fastdiff.plan.row import SLOTS, TERMS
from fastdiff.tuning.history import histories, widened
from fastdiff.tuning.start import Start
from fastdiff.tuning.units import Moments, directions

_AT = {name: i for i, name in enumerate(COLUMNS)}
T, READS, WRITE = _AT["t"], [_AT[f"read{k}"] for k in range(3)], _AT["write"]


class Learned:
    """The parameters, and the table and the plan that they stand for; all are 0 at the start.

    Args:
        start: where learning starts.
        units: [rows, columns]: the unit of each number; 0 where it is not learned.
        learns_levels: whether the network can be told any t, with a gradient. Else the t in ``units`` stay, and so do
            the levels, to which they belong.
        moments: of rows, as ``walk.measured`` sees them at the start; what a row has none of is learned number by
            number.

    Attributes:
        shares: of the gaps between levels; None where levels stay.
        numbers: of the table's columns, along ``directions``.
    """

    def __init__(
        self, start: Start, units: Tensor, learns_levels: bool, moments: Mapping[int, Moments] | None = None
    ) -> None:
        self.start, self.units = start, units
        self.history = widened(start.plan)
        self.shares = torch.zeros(len(start.gaps), dtype=torch.float64) if learns_levels and start.gaps else None
        self.directions = directions(units, moments or {})
        self.numbers = torch.zeros(len(self.directions), dtype=torch.float64)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def parameters(self) -> list[Tensor]:
        return [self.numbers] if self.shares is None else [self.numbers, self.shares]

    def table(self) -> Tensor:
        """The table of ``wide``, float64 [rows, columns], with its gradient by the parameters."""
        table = self.start.table(self.shares)
        return self._structured(table + torch.tensordot(self.numbers, self.directions, 1))

    def _structured(self, table: Tensor) -> Tensor:
        """The table with the slots of the wide history in its columns, the contents of new ones among them."""
        table = table.clone()
        for i, (row, history) in enumerate(zip(self.start.plan, self.history, strict=True)):
            reads = [float(j % SLOTS if j >= 0 else 0) for j in history.reads]
            table[i, READS] = torch.tensor([*reads, -1.0, -1.0, -1.0][:3], dtype=torch.float64)
            table[i, WRITE] = -1.0 if history.slot is None else float(i % SLOTS)
            if row.slot is None and history.slot is not None:
                table[i, _AT["slot.x0"]] = 1.0
        return table

    def wide(self, table: Tensor) -> Plan:
        """The plan of a table, with what each row may read and write."""
        plan = self.start.plan if self.shares is None else self.start.at(self.shares.detach())
        learns_t = bool((self.units[:, T] != 0).any())
        values = table.detach().tolist()
        rows = []
        for i, (row, history) in enumerate(zip(plan, self.history, strict=True)):
            of = values[i]
            rows.append(
                replace(
                    row, t=of[T] if learns_t or self.shares is not None else self.start.plan[i].t,
                    c_in=self.start.plan[0].c_in if i == 0 else values[i - 1][_AT["next_c_in"]],
                    p=of[_AT["p"]], q=of[_AT["q"]], x=_terms(of, "x"),
                    anchor=None if row.anchor is None else _terms(of, "anchor"),
                    slot=None if history.slot is None else _terms(of, "slot"),
                    reads=tuple(j % SLOTS if j >= 0 else 0 for j in history.reads),
                    write=None if history.slot is None else i % SLOTS,
                )
            )  # fmt: skip
        return Plan(tuple(rows), f"tuned {self.start.plan.name}", self.start.plan.init_sigma,
                    self.start.plan.learned_variance)  # fmt: skip

    def plan(self) -> Plan:
        """The plan to keep: the start's own while nothing was learned, and no slot is written that nobody reads."""
        if not any(bool(parameter.any()) for parameter in self.parameters()):
            return self.start.plan
        return pruned(self.wide(self.table()))


def _terms(values: Sequence[float], output: str) -> dict[str, float]:
    return {term: value for term in TERMS if (value := values[_AT[f"{output}.{term}"]])}


def pruned(plan: Plan) -> Plan:
    """The same plan without writes that no row reads, in the fewest slots: output i in slot i mod their number."""
    of_plan = histories(plan)
    lookback = [[(k, i - j) for k, j in enumerate(h.reads) if plan[i].uses(f"slot{k}")] for i, h in enumerate(of_plan)]
    depth = max((back for row in lookback for _, back in row), default=1)
    read = {i - back for i, row in enumerate(lookback) for _, back in row}
    rows = []
    for i, (row, backs) in enumerate(zip(plan, lookback, strict=True)):
        names = {f"slot{k}": f"slot{new}" for new, (k, _) in enumerate(backs)}
        reads = tuple((i - back) % depth for _, back in backs)
        wrote = i in read
        rows.append(
            replace(
                row, x=_renamed(row.x, names), anchor=_renamed(row.anchor, names),
                slot=_renamed(row.slot, names) if wrote else None, reads=reads, write=i % depth if wrote else None,
            )
        )  # fmt: skip
    return replace(plan, rows=tuple(rows))


def _renamed(terms: Any, names: dict[str, str]) -> Any:
    return None if terms is None else {names.get(term, term): value for term, value in terms.items()}
