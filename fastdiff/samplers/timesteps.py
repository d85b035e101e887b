"""Which timesteps a sampler visits, and what a prediction type means: shared by every sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from fastdiff.noise import check_int
from fastdiff.schedule import NoiseSchedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


def select(schedule: NoiseSchedule, steps: int | None, spacing: str, timesteps: Sequence[int] | None) -> list[int]:
    """The indices to visit, falling (Lin et al. 2024, Table 2).

    leading: multiples of T // steps from 0; trailing: from T − 1 down in steps of T / steps; linspace: T − 1 … 0.
    ``timesteps`` lists them instead. ``steps=None`` visits all T. Halves round to even.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule; got {type(schedule).__name__}")
    if not isinstance(spacing, str) or spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; it must be one of {', '.join(SPACINGS)}")
    T = len(schedule)
    if timesteps is not None:
        if isinstance(timesteps, str) or not isinstance(timesteps, Sequence):
            raise TypeError(f"timesteps must be a sequence of ints; got {type(timesteps).__name__}")
        if steps is not None and check_int("steps", steps, 1, T) != len(timesteps):
            raise ValueError(f"steps is {steps}, but timesteps has {len(timesteps)} entries; give one of them")
        chosen = [check_int(f"timesteps[{i}]", t, 0, T - 1) for i, t in enumerate(timesteps)]
        if not chosen or any(a <= b for a, b in pairwise(chosen)):
            raise ValueError("timesteps must fall strictly and hold at least one index")
        return chosen
    count = T if steps is None else check_int("steps", steps, 1, T)
    if spacing == "leading":
        return [i * (T // count) for i in reversed(range(count))]
    if spacing == "trailing":
        return [round(T - i * (T / count)) - 1 for i in range(count)]
    gap = (T - 1) / (count - 1) if count > 1 else 0.0
    return [round(i * gap) for i in reversed(range(count))]


def x0_terms(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(p, q) of x̂_0 = p·x + q·m for a network that predicts ``prediction`` at x = alpha·x_0 + sigma·ε."""
    if prediction == "epsilon":
        if alpha == 0:
            raise ValueError("epsilon says nothing of x_0 where ᾱ is 0; take prediction='v_prediction' or 'sample'")
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":  # Salimans & Ho 2022, Appendix D
        return alpha, -sigma
    if prediction == "sample":
        return 0.0, 1.0
    raise ValueError(f"prediction is {prediction!r}; it must be one of {', '.join(PREDICTIONS)}")


def epsilon_terms(prediction: str, alpha: float, sigma: float) -> dict[str, float]:
    """ε as a combination of the terms x and m, for the same network."""
    if prediction == "epsilon":
        return {"m": 1.0}
    if prediction == "v_prediction":
        return {"x": sigma, "m": alpha}
    if sigma == 0:
        return {}
    return {"x": 1 / sigma, "m": -alpha / sigma}


def check_clip(clip: float | None) -> float:
    """The bound of |x̂_0| as a float, infinite for None."""
    if clip is None:
        return math.inf
    if isinstance(clip, bool) or not isinstance(clip, (int, float)):
        raise TypeError(f"clip must be a number or None; got {type(clip).__name__}")
    if math.isnan(clip) or clip <= 0:
        raise ValueError(f"clip must be positive; got {clip}")
    return float(clip)
