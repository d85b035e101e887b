"""RELIABILITY.md is what tools/reliability renders of its measured numbers, and says what was missed."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "reliability"
MACHINE = {"machine": "x86_64, 1 of 2 cores, load 3.0, torch 2", "seconds": 1.0}


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL))
    import report

    yield report.render
    for name in ("report", "processes"):
        del sys.modules[name]


def test_the_page_is_rendered_of_what_was_measured(render):
    measured = json.loads((TOOL / "measured.json").read_text())
    assert (ROOT / "RELIABILITY.md").read_text(encoding="utf-8") == render(measured)


def test_what_is_wrong_missed_or_not_run_is_said(render):
    kills = {
        "one process": {"num": 20, "steps": 1, "kills": {"worker": 3, "launcher": 0}, "while_it_made": 2, "sets": 1,
                        "left_over": 0.5, "sha256": "ab", "right": False, "wrong": ["image 3 twice"], **MACHINE},
        "Ray": {"not_run": "no ray", **MACHINE},
    }  # fmt: skip
    long = {"num": 1000, "steps": 5, "resident_tenth": 100.0, "resident_end": 106.0, "rate": 9.6, "bare_before": 10.0,
            "bare_after": 10.0, "ratio": 0.96, "ratio_of_processor_time": 0.9, **MACHINE}  # fmt: skip
    page = render({"kills": kills, "long": {"long": long}})
    assert "**WRONG**: ['image 3 twice']" in page
    assert "not run: no ray" in page
    assert "+6.0% | within 5%: **missed**" in page
    assert "0.960 | at least 0.97: **missed**" in page
    assert "held" in render({"long": {"long": {**long, "ratio": 0.98}}})
