"""A plan as text: the table that ``print(plan)`` shows, and JSON that gives back every float64 to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import msgspec

from fastdiff.files import parse_json
from fastdiff.plan.provenance import Provenance
from fastdiff.plan.row import TERMS, Row

FORMAT = "fastdiff.plan"
VERSION = 1
LINES = 40  # rows of a printed table; of a longer plan the middle is left out

# ---- JSON: a row is an object of its fields; one that is absent has Row's default (an infinite clip, say)


def to_json(
    rows: Sequence[Row], name: str, init_sigma: float, learned_variance: bool, provenance: Provenance | None = None
) -> str:
    """The plan as a JSON object, one line a row. Python writes the shortest digits that read back as the same float."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "init_sigma": init_sigma,
        "learned_variance": learned_variance,
    }
    if provenance is not None:
        head["provenance"] = msgspec.to_builtins(provenance)
    lines = [f"  {json.dumps(key)}: {_dump(value)}," for key, value in head.items()]
    entries = ",\n".join(f"    {_dump(_changed(row))}" for row in rows)
    return "\n".join(["{", *lines, '  "rows": [', entries, "  ]", "}", ""])


def from_json(text: str | bytes) -> dict[str, Any]:
    """A plan's arguments as ``to_json`` wrote them; ValueError says what is wrong with anything else, and where
    ($.rows[3].clip).
    """
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"text must be str or bytes; got {type(text).__name__}")
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not a plan's JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = f"format {content.get('format')!r}" if isinstance(content, dict) else f"a JSON {type(content).__name__}"
        raise ValueError(f"not a plan's JSON: it must be an object whose format is {FORMAT!r}; got {got}")
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"the plan's version is {version!r}; this fastdiff reads version {VERSION}")
    try:
        told = msgspec.convert(content, _PlanFields)
    except msgspec.ValidationError as error:
        raise ValueError(f"the plan does not fit its format: {error}") from None
    rows = []
    for i, entry in enumerate(content["rows"]):  # as JSON gave them: a t of 3 stays the int that to_json wrote
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
            rows.append(Row(**values))
        except ValueError as error:
            raise ValueError(f"the plan does not fit its format: {error} - at `$.rows[{i}]`") from None
    names = ("name", "init_sigma", "learned_variance")
    return {"rows": tuple(rows), **{name: content[name] for name in names}, "provenance": told.provenance}


_FIELDS = [field for field in fields(Row) if field.init]
_HINTS = get_type_hints(Row)
_RowFields: Any = msgspec.defstruct(
    "_RowFields",
    [(f.name, _HINTS[f.name]) if f.default is MISSING else (f.name, _HINTS[f.name], f.default) for f in _FIELDS],
    forbid_unknown_fields=True,
)
_HEAD = {"format": str, "version": int, "name": str, "init_sigma": float, "learned_variance": bool}
_PlanFields: Any = msgspec.defstruct(
    "_PlanFields",
    [*_HEAD.items(), ("rows", list[_RowFields]), ("provenance", Provenance | None, None)],
    forbid_unknown_fields=True,
)


def _changed(row: Row) -> dict[str, Any]:
    """The fields that differ from their defaults (0.0 and -0.0 differ)."""
    every = {field.name: (getattr(row, field.name), field.default) for field in _FIELDS}
    return {name: value for name, (value, default) in every.items() if repr(value) != repr(default)}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    """A mapping, or a number of another library, as JSON knows it."""
    if isinstance(value, Mapping):
        return dict(value)
    if callable(getattr(value, "item", None)):
        return value.item()
    raise TypeError(f"a plan with a {type(value).__name__} cannot be written as JSON")


# ---- the table


def table_text(rows: Sequence[Row], name: str, init_sigma: float, learned_variance: bool, at_most: int = LINES) -> str:
    """An aligned table: of each row its level, x̂_0 = p·x + q·m, the coefficients of x', its noise, and what it keeps.

    A column that would be the same in every row stands in the heading or is left out. Slots are named by their numbers.
    """
    columns = _columns(rows)
    numbers = list(range(len(rows)))
    if len(rows) > at_most:
        numbers = [*numbers[: at_most // 2], *numbers[len(rows) - at_most // 2 :]]
    cells = [[title for title, _ in columns]]
    cells += [[content(i, rows[i]) for _, content in columns] for i in numbers]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(_aligned(line, widths, columns)) for line in cells]
    if len(rows) > at_most:
        lines.insert(1 + at_most // 2, f"{'⋮'.rjust(widths[0])}  {len(rows) - len(numbers)} more rows")
    heading = _heading(rows, name, init_sigma, learned_variance)
    return "\n".join([heading, "", *(line.rstrip() for line in lines)])


def _aligned(line: list[str], widths: list[int], columns: list[tuple[str, Any]]) -> list[str]:
    """Numbers to the right, text to the left."""
    padded = zip(line, widths, columns, strict=True)
    return [cell.ljust(width) if title == "keeps" else cell.rjust(width) for cell, width, (title, _) in padded]


def _heading(rows: Sequence[Row], name: str, init_sigma: float, learned_variance: bool) -> str:
    whole = [row for row in rows if row.calls_model and row.reuse is None]
    shallow, outputs = (sum(row.reuse == kind for row in rows) for kind in ("deep", "output"))
    parts = [_count(len(rows), "row"), _count(len(whole), "network call")]
    if shallow:
        parts.append(f"{_count(shallow, 'shallow call')} of branch {max(row.branch for row in rows)}")
    if outputs:
        parts.append(_count(outputs, "reused output"))
    parts.append(f"x_T = {_short(init_sigma)} z")
    for field in ("clip", "scale", "c_in", "stream"):
        values = {getattr(row, field) for row in rows}
        if len(values) == 1 and values != {_DEFAULTS[field]}:
            parts.append(f"{field} {_short(values.pop())}")
    if learned_variance:
        parts.append("learned variance")
    return f"{name}: {', '.join(parts)}"


_DEFAULTS = {"clip": math.inf, "scale": 1.0, "c_in": 1.0, "stream": 1}


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[int, Row], str]]]:
    """Titles, and the cell of a row."""
    columns: list[tuple[str, Callable[[int, Row], str]]] = [
        ("row", lambda i, row: str(i)),
        ("t", lambda i, row: _short(row.t)),
    ]
    if any(row.alpha != 1 for row in rows):
        columns.append(("alpha", lambda i, row: _short(row.alpha)))
    columns.append(("sigma", lambda i, row: _short(row.sigma)))
    for name in ("c_in", "clip", "scale", "stream"):
        if len({getattr(row, name) for row in rows}) > 1:
            columns.append((name, lambda i, row, name=name: _short(getattr(row, name))))  # type: ignore[misc]
    columns.append(("call", lambda i, row: "yes" if row.runs_network else "no"))
    if any(row.reuse for row in rows):
        columns.append(("reuse", lambda i, row: row.reuse or "·"))
    columns += [("p", lambda i, row: _blank(row.p)), ("q", lambda i, row: _blank(row.q))]
    of_row = [named(row, row.x) for row in rows]
    order = [*TERMS[:4], *(f"slot {k}" for k in range(4)), "g", "z"]
    for term in order:
        if any(coefficients.get(term) for coefficients in of_row):
            title = "noise" if term == "z" else f"·{term}"
            columns.append((title, lambda i, row, term=term: _blank(of_row[i].get(term, 0.0))))  # type: ignore[misc]
    if any(row.anchor is not None or row.slot is not None for row in rows):
        columns.append(("keeps", lambda i, row: _keeps(row)))
    return columns


def named(row: Row, coefficients: Mapping[str, float]) -> dict[str, float]:
    """Coefficients by what is read: slot0, slot1, slot2 under the numbers of their slots."""
    result: dict[str, float] = {}
    for term, value in coefficients.items():
        if term.startswith("slot") and value:
            term = f"slot {row.reads[int(term[4])]}"
        result[term] = result.get(term, 0.0) + value
    return result


def _keeps(row: Row) -> str:
    written = [("anchor", row.anchor)] if row.anchor is not None else []
    if row.slot is not None:
        written.append((f"slot {row.write}", row.slot))
    return "; ".join(f"{name} = {_sum(named(row, c))}" for name, c in written)


def _sum(coefficients: Mapping[str, float]) -> str:
    terms = [(term, value) for term, value in coefficients.items() if value]
    text = " + ".join(term if value == 1 else f"{_short(value)} {term}" for term, value in terms)
    return text.replace("+ -", "− ").replace("-", "−") if text else "0"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _short(value: float) -> str:
    return f"{value:.5g}"


def _blank(value: float) -> str:
    return _short(value) if value else "·"
