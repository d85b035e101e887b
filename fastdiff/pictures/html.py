"""What notebooks show of a plan, a schedule, a state and a report: small tables, and curves as inline SVG."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

_CELL = "padding:1px 8px;text-align:"
_PIXELS = 1 << 19  # of the images shown of a state: a notebook keeps the picture in its file


def of_plan(plan: Any) -> str:
    """Its heading, the curve of σ, and the table that ``print`` shows."""
    heading, _, table = str(plan).partition("\n\n")
    curve = sparkline([row.sigma for row in plan])
    return f"<div><b>{html.escape(heading)}</b> {curve}</div><pre>{html.escape(table)}</pre>"


def of_schedule(schedule: Any) -> str:
    """Its repr, and the curves of α and σ where it has a table."""
    told = f"<code>{html.escape(repr(schedule))}</code>"
    count = schedule.table_length
    if count is None:
        return told
    levels = [schedule.level(i * (count - 1) // 100 if count > 100 else i) for i in range(min(count, 101))]
    curves = ((name, sparkline([getattr(level, name) for level in levels])) for name in ("alpha", "sigma"))
    return told + "".join(f"&ensp;{name} {curve}" for name, curve in curves)


def words_of_state(state: Any) -> str:
    """Where it stands in its run, and what it holds, without the numbers."""
    t = "" if state.t is None else f"t={state.t:.5g}, "
    held = ["no x0" if state.x0 is None else "x0", *(["anchor"] if state.anchor is not None else [])]
    held += [f"slot {k}" for k, slot in enumerate(state.slots) if slot is not None]
    held += [name for name in ("output", "deep") if getattr(state, name) is not None]
    return f"State(row={state.row}, {t}x={list(state.x.shape)} on {state.x.device}, {', '.join(held)})"


def of_state(state: Any) -> str:
    """Where it stands in its run, and, of images, pictures of x and of x̂_0."""
    told = [("", f"<code>{html.escape(repr(state))}</code>")]
    for name in ("x", "x0"):
        picture = _picture(getattr(state, name))
        if picture:
            told.append((name, picture))
    return table([], told, escaped=True)


def of_report(title: str, rows: Sequence[Sequence[object]]) -> str:
    """A title and a table of rows of one length."""
    return f"<div><b>{html.escape(title)}</b></div>" + table([], rows)


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, escaped: bool = False) -> str:
    """Numbers to the right, all else to the left; cells are escaped unless they are HTML already."""

    def line(cells: Sequence[object], tag: str) -> str:
        told = []
        for cell in cells:
            side = "right" if isinstance(cell, (int, float)) else "left"
            told.append(f'<{tag} style="{_CELL}{side}">{cell if escaped else html.escape(str(cell))}</{tag}>')
        return f"<tr>{''.join(told)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table>{line(head, 'th') if head else ''}{body}</table>"


def sparkline(values: Sequence[float], width: int = 120, height: int = 24) -> str:
    """The curve of some numbers as an SVG; where they span more than two powers of ten, of their logarithms."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    if min(finite) > 0 and max(finite) / min(finite) > 100:
        finite = [math.log(value) for value in finite]
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    points = " ".join(
        f"{1 + i * (width - 2) / (len(finite) - 1):.1f},{height - 1 - (value - low) / span * (height - 2):.1f}"
        for i, value in enumerate(finite)
    )
    return (
        f'<svg width="{width}" height="{height}" style="vertical-align:middle"><polyline points="{points}" '
        'fill="none" stroke="currentColor"/></svg>'
    )


def _picture(images: Any) -> str:
    """At most 64 images, of large ones fewer, as an inline PNG; nothing for what is no batch of grey or RGB images."""
    if images is None or images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        return ""
    from fastdiff.pictures.grid import make_grid

    file = io.BytesIO()
    count = max(1, min(64, _PIXELS // images[0, 0].numel()))
    make_grid(images[:count].nan_to_num()).save(file, format="PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"/>'
