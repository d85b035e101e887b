"""Noise schedules as a picture: signal and noise, the signal-to-noise ratio and β over the timesteps."""

from __future__ import annotations

import math
from typing import Any

from fastdiff.pictures.figure import new_figure

POINTS = 200  # of a schedule without a table


def figure(*schedules: Any) -> Any:
    """A matplotlib figure of one or more schedules, a colour each, from the image (0) to noise (1).

    That is t/T where there is a table, σ before its shift in a flow, ln σ in EDM. Above α and σ of x = α x_0 + σ ε;
    then λ = ln(α/σ), half the log signal-to-noise ratio; below β, of schedules with a table.
    Raises TypeError for what is no schedule, ImportError that names the extra where matplotlib is missing.
    """
    if not schedules or not all(hasattr(schedule, "level") and hasattr(schedule, "at") for schedule in schedules):
        raise TypeError(f"schedule takes one or more schedules; got {', '.join(map(repr, schedules)) or 'none'}")
    tables = [schedule for schedule in schedules if hasattr(schedule, "betas")]
    drawing = new_figure(7, 6.5 if tables else 4.5)
    axes = drawing.subplots(2 + bool(tables), sharex=True)
    for i, schedule in enumerate(schedules):
        colour, name = f"C{i % 10}", repr(schedule)
        levels = _levels(schedule)
        places = [k / max(1, len(levels) - 1) for k in range(len(levels))]
        axes[0].plot(places, [level.alpha for level in levels], color=colour, label=name)
        axes[0].plot(places, [level.sigma for level in levels], color=colour, linestyle="--")
        snr = [level.log_snr if math.isfinite(level.log_snr) else math.nan for level in levels]
        axes[1].plot(places, snr, color=colour)
        if schedule in tables:
            axes[2].plot(places, schedule.betas.tolist(), color=colour)
    if max(level.sigma for schedule in schedules for level in _levels(schedule)) > 10:
        axes[0].set_yscale("log")
    axes[0].set(ylabel="α, and σ dashed")
    axes[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.02))
    axes[1].set(ylabel="λ = ln(α/σ)")
    if tables:
        axes[2].set(ylabel="β", yscale="log")
    axes[-1].set(xlabel="from the image to noise")
    for ax in axes:
        ax.grid(alpha=0.3)
    return drawing


def _levels(schedule: Any) -> list[Any]:
    """Its levels, the image's end first: of a table all of them; else as samplers would stop, or evenly in ln σ."""
    if schedule.table_length is not None:
        return [schedule.level(t) for t in range(schedule.table_length)]
    if schedule.default_spacing == "trailing":
        return schedule.indexed("trailing", POINTS)[::-1]
    low, high = schedule.sigma_min, schedule.sigma_max
    return [schedule.at(low * (high / low) ** (k / POINTS)) for k in range(POINTS + 1)]
