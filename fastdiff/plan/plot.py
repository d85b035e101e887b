"""A plan as a picture: the noise level, the coefficients and the noise of each row. matplotlib draws it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.pictures.figure import new_figure, save_figure
from fastdiff.plan.row import TERMS
from fastdiff.plan.text import named

if TYPE_CHECKING:
    from fastdiff.plan.plan import Plan


def save_plot(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write ``figure`` as a PNG, whole or not at all. Returns its path. Raises ImportError as it does, and OSError."""
    return save_figure(lambda: figure(plan), path)


def figure(plan: Plan) -> Any:
    """A matplotlib figure of three panels over the rows.

    Above σ, or α and σ where states are not x_0 + σ ε; then the coefficients of x', slots by their numbers; below the
    coefficient of the noise. Open circles are rows without a network call.
    Raises ImportError that names the extra where matplotlib is missing.
    """
    rows = range(len(plan))
    marker = "." if len(plan) <= 100 else ""
    drawing = new_figure(8, 8)
    level, terms, noise = drawing.subplots(3, sharex=True, height_ratios=[2, 3, 1.4])

    sigmas = [row.sigma for row in plan]
    level.plot(rows, sigmas, marker=marker, label="σ")
    if any(row.alpha != 1 for row in plan):
        level.plot(rows, [row.alpha for row in plan], marker=marker, label="α")
    elif min(sigmas) > 0:
        level.set_yscale("log")
    silent = [i for i, row in enumerate(plan) if not row.runs_network]
    if silent:
        level.plot(silent, [sigmas[i] for i in silent], "o", mfc="none", color="k", label="no network call")
    level.set(ylabel="level", title=f"{plan.name}: {len(plan)} rows, {len(plan) - len(silent)} network calls")

    coefficients = [named(row, row.x) for row in plan]
    order = [*TERMS[:4], *(f"slot {k}" for k in range(4)), "g"]
    for term in order:
        values = [c.get(term, math.nan) for c in coefficients]
        if not all(math.isnan(value) for value in values):
            # Rows that do not read a term leave a gap; a marker shows a value that stands alone.
            terms.plot(rows, values, marker=marker or ",", label=term)
    terms.set(ylabel="coefficients of x'")
    drawn = [c.get("z", 0.0) for c in coefficients]
    noise.bar(rows, drawn, color="C7", width=0.8 if marker else 1.0)
    noise.set(ylabel="noise", xlabel="row")
    if not any(drawn):
        noise.set_ylim(0, 1)
        noise.text(0.5, 0.5, "none", transform=noise.transAxes, ha="center", va="center")
    noise.xaxis.get_major_locator().set_params(integer=True)
    for axes in (level, terms, noise):
        axes.grid(alpha=0.3)
    for axes in (level, terms):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawing
