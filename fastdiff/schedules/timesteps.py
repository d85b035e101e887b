"""Which entries of a schedule's table a sampler visits."""

from __future__ import annotations

import math
from typing import Any

from fastdiff.checks import check_choice, check_int, is_finite, shown

SPACINGS = ("leading", "trailing", "linspace", "quadratic", "ddim_quadratic", "simple")


def select(T: int, steps: int | None, spacing: str, steps_offset: int = 0) -> list[int]:
    """The indices of a table of T to visit, falling (Lin et al. 2024, Table 2).

    leading: multiples of T // steps from 0, plus steps_offset; trailing: from T − 1 down in steps of T / steps;
    linspace: T − 1 … 0; quadratic: the same squared (Song et al. 2021, Appendix D.2); ddim_quadratic: ⌊c i²⌋ up to
    0.8 T, the list that the authors' code has for it, of which DDIM's published CIFAR-10 numbers are. simple: of the
    indices from T − 1 down every (T / steps)-th, places rounded down (ComfyUI). Halves round to even.

    ``steps=None`` visits all T. An index that a quadratic list has several times, near 0, is visited once: a step from
    a level to itself moves nothing where no noise is drawn, so that the authors' code draws the same image with more
    network calls. Such a list is then shorter than ``steps``.
    """
    check_choice("spacing", spacing, SPACINGS)
    count = T if steps is None else check_int("steps", steps, 1, T)
    gap = (T - 1) / (count - 1) if count > 1 else 0.0
    if spacing == "leading":
        room = T - 1 - (count - 1) * (T // count)
        offset = check_int(f"steps_offset, in {count} steps of {T},", steps_offset, 0, room)
        return [i * (T // count) + offset for i in reversed(range(count))]
    if spacing == "trailing":
        return [round(T - i * (T / count)) - 1 for i in range(count)]
    if spacing == "simple":
        return [T - 1 - int(i * (T / count)) for i in range(count)]
    if spacing == "quadratic":
        chosen = (round((i * gap) ** 2 / (T - 1)) if T > 1 else 0 for i in reversed(range(count)))
        return list(dict.fromkeys(chosen))
    if spacing == "ddim_quadratic":
        # int(), in float64, as the authors' list is made: linspace(0, √(0.8 T), steps)².
        top = math.sqrt(0.8 * T)
        ramp = [i * (top / (count - 1)) for i in range(count - 1)] + [top] if count > 1 else [0.0]
        return list(dict.fromkeys(min(int(root**2), T - 1) for root in reversed(ramp)))
    return [round(i * gap) for i in reversed(range(count))]


def listed(name: str, values: Any, steps: int | None = None) -> list[float]:
    """A list of finite numbers as floats: a sequence, array or tensor of one dimension, one entry a step."""
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise TypeError(f"{name} must be a sequence of numbers; got {type(values).__name__}")
    entries = values.tolist() if hasattr(values, "tolist") else list(values)
    numbers: list[float] = []
    for i, value in enumerate(entries):
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a sequence of numbers; entry {i} is {type(value).__name__}")
        if not is_finite(value):
            raise ValueError(f"{name} must be finite; entry {i} is {shown(value)}")
        numbers.append(float(value))
    if not numbers:
        raise ValueError(f"{name} must hold at least one number")
    if steps is not None and check_int("steps", steps, 1, 1 << 20) != len(numbers):
        raise ValueError(f"steps is {steps}, but {name} is for {len(numbers)}; give one of them")
    return numbers
