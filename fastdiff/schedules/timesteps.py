"""Which entries of a schedule's table a sampler visits."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from fastdiff.checks import check_choice, check_int

SPACINGS = ("leading", "trailing", "linspace", "quadratic")


def select(T: int, steps: int | None, spacing: str, steps_offset: int = 0) -> list[float]:
    """The indices of a table of T to visit, falling (Lin et al. 2024, Table 2).

    leading: multiples of T // steps from 0, plus steps_offset; trailing: from T − 1 down in steps of T / steps;
    linspace: T − 1 … 0; quadratic: the same squared (Song et al. 2021, Appendix D.2). ``steps=None`` visits all T.
    Halves round to even.
    """
    check_choice("spacing", spacing, SPACINGS)
    chosen: list[float]
    count = T if steps is None else check_int("steps", steps, 1, T)
    gap = (T - 1) / (count - 1) if count > 1 else 0.0
    if spacing == "leading":
        offset = check_int("steps_offset", steps_offset, 0, T - 1 - (count - 1) * (T // count))
        return [i * (T // count) + offset for i in reversed(range(count))]
    if spacing == "trailing":
        return [round(T - i * (T / count)) - 1 for i in range(count)]
    if spacing == "quadratic":
        chosen = [round((i * gap) ** 2 / (T - 1)) if T > 1 else 0 for i in reversed(range(count))]
        if any(a <= b for a, b in pairwise(chosen)):
            raise ValueError(f"spacing='quadratic' visits an index twice in {count} steps of {T}; take fewer steps")
        return chosen
    return [round(i * gap) for i in reversed(range(count))]


def listed(name: str, values: Any, steps: int | None = None) -> list[float]:
    """A list of finite numbers as floats: a sequence, array or tensor of one dimension, one entry a step."""
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise TypeError(f"{name} must be a sequence of numbers; got {type(values).__name__}")
    entries = values.tolist() if hasattr(values, "tolist") else list(values)
    numbers = []
    for i, value in enumerate(entries):
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a sequence of numbers; entry {i} is {type(value).__name__}")
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite; entry {i} is {value}")
        numbers.append(float(value))
    if not numbers:
        raise ValueError(f"{name} must hold at least one number")
    if steps is not None and check_int("steps", steps, 1, 1 << 20) != len(numbers):
        raise ValueError(f"steps is {steps}, but {name} is for {len(numbers)}; give one of them")
    return numbers
