"""Which entries of a schedule's table a sampler visits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fastdiff.noise import check_int
from fastdiff.schedule import NoiseSchedule

SPACINGS = ("leading", "trailing", "linspace", "quadratic")


def select(
    schedule: NoiseSchedule,
    steps: int | None,
    spacing: str,
    timesteps: Sequence[float] | None,
    steps_offset: int = 0,
) -> list[float]:
    """The indices to visit, falling (Lin et al. 2024, Table 2).

    leading: multiples of T // steps from 0, plus steps_offset; trailing: from T − 1 down in steps of T / steps;
    linspace: T − 1 … 0; quadratic: the same squared (Song et al. 2021, Appendix D.2). ``timesteps`` lists them instead,
    between indices too. ``steps=None`` visits all T. Halves round to even.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule; got {type(schedule).__name__}")
    if not isinstance(spacing, str) or spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; it must be one of {', '.join(SPACINGS)}")
    T = len(schedule)
    if timesteps is not None:
        if isinstance(timesteps, str) or not isinstance(timesteps, Sequence):
            raise TypeError(f"timesteps must be a sequence of numbers; got {type(timesteps).__name__}")
        if steps is not None and check_int("steps", steps, 1, T) != len(timesteps):
            raise ValueError(f"steps is {steps}, but timesteps has {len(timesteps)} entries; give one of them")
        chosen = [_index(f"timesteps[{i}]", t, T) for i, t in enumerate(timesteps)]
        if not chosen or any(a <= b for a, b in pairwise(chosen)):
            raise ValueError("timesteps must fall strictly and hold at least one index")
        return chosen
    count = T if steps is None else check_int("steps", steps, 1, T)
    gap = (T - 1) / (count - 1) if count > 1 else 0.0
    if spacing == "leading":
        offset = check_int("steps_offset", steps_offset, 0, T - 1 - (count - 1) * (T // count))
        return [i * (T // count) + offset for i in reversed(range(count))]
    if steps_offset:
        raise ValueError(f"steps_offset goes with spacing='leading', not with {spacing!r}")
    if spacing == "trailing":
        return [round(T - i * (T / count)) - 1 for i in range(count)]
    if spacing == "quadratic":
        chosen = [round((i * gap) ** 2 / (T - 1)) if T > 1 else 0 for i in reversed(range(count))]
        if any(a <= b for a, b in pairwise(chosen)):
            raise ValueError(f"spacing='quadratic' visits an index twice in {count} steps of {T}; take fewer steps")
        return chosen
    return [round(i * gap) for i in reversed(range(count))]


def _index(name: str, t: float, T: int) -> float:
    if not isinstance(t, float) or t.is_integer():
        return check_int(name, int(t) if isinstance(t, float) else t, 0, T - 1)
    if not 0 <= t <= T - 1:
        raise ValueError(f"{name} must be in [0, {T - 1}]; got {t}")
    return t
