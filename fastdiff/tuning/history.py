"""What each row of a plan reads of earlier ones, and the most that it could."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.plan.plan import Plan
from fastdiff.plan.row import SLOTS


@dataclass(frozen=True)
class History:
    """What a row reads of earlier ones, by the numbers of the rows that left it, and whether it leaves something."""

    reads: tuple[int, ...]
    slot: dict[str, float] | None


def histories(plan: Plan) -> list[History]:
    """The history of a plan's rows: slots by who wrote them."""
    holder: dict[int, int] = {}
    found = []
    for i, row in enumerate(plan):
        used = {k for k in range(len(row.reads)) if row.uses(f"slot{k}")}
        reads = tuple(holder.get(slot, -1) if k in used else -1 for k, slot in enumerate(row.reads))
        found.append(History(reads, None if row.slot is None else dict(row.slot)))
        if row.write is not None:
            holder[row.write] = i
    return found


def widened(plan: Plan) -> list[History]:
    """A history in which every call leaves its x̂_0 where it left nothing, and a row reads the last three outputs.

    That is all that a row can express: a multistep method of four evaluations, with numbers of its own in every row
    (Shaul et al. 2024). What the plan reads keeps its place: slot0 is what it was.
    """
    wide: list[History] = []
    of_plan = histories(plan)
    slots = [h.slot or ({"x0": 1.0} if row.calls_model else None) for row, h in zip(plan, of_plan, strict=True)]
    for i, history in enumerate(of_plan):
        if any(0 <= j < i - SLOTS for j in history.reads):
            return of_plan  # older than a ring of four slots
        recent = [j for j in range(i - 1, max(-1, i - SLOTS), -1) if slots[j] is not None and j not in history.reads]
        reads = list(history.reads)
        for k, j in enumerate(reads):
            if j < 0 and recent:
                reads[k] = recent.pop(0)
        reads = [*reads, *recent][:3]
        wide.append(History(tuple(reads), slots[i] if i + 1 < len(plan) else None))
    return wide
