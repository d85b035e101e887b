"""A learned plan as a picture: how it compares, and where its levels lie."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from fastdiff.pictures.figure import new_figure, save_figure
from fastdiff.plan.plan import Plan


def save_plot(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write ``figure`` as a PNG, whole or not at all. Returns its path. Raises ImportError as it does, and OSError."""
    return save_figure(lambda: figure(plan), path)


def figure(plan: Plan) -> Any:
    """A matplotlib figure: held-out error against network calls; the learned levels beside the start's.

    Raises ValueError for a plan that was not learned, ImportError that names the extra where matplotlib is missing.
    """
    told = plan.provenance
    if told is None:
        raise ValueError(f"the plan {plan.name!r} was not learned: it has no provenance")
    drawing = new_figure(10, 4.4)
    errors, levels = drawing.subplots(1, 2)
    for name, of_name in told.errors.items():
        line = [(int(count), error) for count, error in of_name.items() if math.isfinite(error)]
        marker = "*" if name == "tuned" else "o"
        errors.plot(*zip(*line, strict=True), marker=marker, markersize=12 if name == "tuned" else 5, label=name)
    errors.set(xlabel="network calls", ylabel=f"distance to {told.teacher}, {told.teacher_calls} calls", xscale="log",
               yscale="log", title="held-out noise")  # fmt: skip
    counts = sorted({int(count) for of_name in told.errors.values() for count in of_name})
    errors.set_xticks(counts, [str(count) for count in counts])
    errors.minorticks_off()
    calls = [row for row in plan if row.runs_network]
    ratios = [row.sigma / row.alpha if row.alpha else math.nan for row in calls]
    levels.plot(ratios, marker="*", markersize=10, label="learned")
    before = [math.nan if ratio is None else ratio for ratio in told.start_levels]
    levels.plot(before, marker="o", label=f"{told.start}'s")
    levels.set(xlabel="network call", ylabel="σ/α", yscale="log", title="levels")
    levels.xaxis.get_major_locator().set_params(integer=True)
    for axes in (errors, levels):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return drawing
