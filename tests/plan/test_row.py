"""Rows: their columns are the C++ struct's, and what a row refuses."""

import math
import re
from pathlib import Path

import pytest

from fastdiff.plan.plan import COLUMNS, SLOTS, TERMS, Row

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "common" / "row.h"


def fields(struct: str) -> list[tuple[str, str]]:
    """(type, name) of a struct of the header, in order."""
    body = re.search(rf"struct {struct} \{{(.*?)\}};", HEADER.read_text(), re.DOTALL)
    assert body is not None
    lines = re.sub(r"//[^\n]*", "", body[1])
    return [(m[1], name.strip()) for m in re.finditer(r"(\w+) ([\w, ]+);", lines) for name in m[2].split(",")]


@pytest.mark.skipif(not HEADER.exists(), reason="no sources beside the tests")
def test_columns_are_the_struct():
    assert [("float", term) for term in TERMS] == fields("Combination")
    columns = []
    for kind, name in fields("Row"):
        columns += [f"{name}.{term}" for term in TERMS] if kind == "Combination" else [name]
    assert tuple(columns) == COLUMNS
    assert len(COLUMNS) == 48
    assert "sizeof(Row) == 48 * sizeof(float)" in HEADER.read_text()


def row(**changes) -> Row:
    return Row(**{"t": 3, "alpha": 0.5, "sigma": 0.8, "x": {"x": 1.0}, **changes})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"x": {"y": 1.0}}, "'y'"),
        ({"x": {"z": math.nan}}, "'z'"),
        ({"anchor": {"z": math.inf}}, "anchor"),
        ({"x": {"slot0": 1.0}}, "reads"),
        ({"x": {"slot1": 1.0}, "reads": (0,)}, "reads"),
        ({"reads": (0, 1, 2, 3)}, "reads"),
        ({"reads": (SLOTS,)}, "reads"),
        ({"reads": (-1,)}, "reads"),
        ({"slot": {"x": 1.0}, "write": SLOTS}, "write"),
        ({"slot": {"x": 1.0}}, "write"),
        ({"write": 1}, "slot"),
        ({"t": math.nan}, "t, "),
        ({"p": math.inf}, "p, "),
        ({"c_in": math.nan}, "c_in"),
        ({"log_variance": (math.nan, 0.0)}, "log_variance"),
        ({"clip": 0.0}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"calls_model": False, "q": 1.0}, "network call"),
        ({"calls_model": False, "x": {"m": 1.0}}, "network call"),
        ({"stream": -1}, "stream"),
        ({"stream": 1 << 24}, "stream"),  # the table is float32
    ],
)
def test_a_row_refuses(changes, names):
    with pytest.raises(ValueError, match=names):
        row(**changes)
