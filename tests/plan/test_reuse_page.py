"""docs/reuse.md: it is what the script renders of the figures that were measured, and it says who won."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "examples" / "reuse.json"


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("reuse_page", ROOT / "examples" / "reuse_page.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "reuse_page", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not FIGURES.exists(), reason="no figures beside the tests")
def test_the_page_is_rendered(page):
    assert (ROOT / "docs" / "reuse.md").read_text() == page.render(json.loads(FIGURES.read_text()))


def test_who_wins(page):
    names = [f"{page.SAMPLERS[0]}, {page.STEPS} steps", "near", "alike"]
    numbers = [(10.0, 0.1, 9.0), (4.0, 0.2, 12.0), (4.5, 0.3, 10.0)]
    rows = [
        {"method": name, "calls": 5, "shallow": 0, "ms": ms, "distance": distance, "frechet": frechet}
        for name, (ms, distance, frechet) in zip(names, numbers, strict=True)
    ]
    told = page.winners(rows).splitlines()
    assert len(told) == 2
    for line, share in zip(told, ("75%", "50%"), strict=True):
        assert line.startswith(f"- Within {share}")
        assert "**near** (0.200)" in line
        assert "**alike** (10.00)" in line
    assert page.winners(rows[1:]) == ""  # while the whole plan is not measured
    lines = page.table(rows).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["near", "alike", names[0]]


def test_methods_and_their_calls(page):
    """The package's calls are those that ours makes of the same interval."""
    import fastdiff

    schedule = fastdiff.NoiseSchedule.linear()
    of_name = {m.name: m for m in page.methods("ddim", lambda name, n: fastdiff.samplers.ddim(schedule, n), True)}
    for every in page.EVERY:
        name = f"ddim, {page.STEPS} steps, one call in {every}"
        ours, theirs = of_name[f"{name}, deep features again"], of_name[f"{name}, DeepCache's package"]
        assert (ours.calls, ours.shallow) == (theirs.calls, theirs.shallow)
        assert ours.calls + ours.shallow == page.STEPS
        outputs = of_name[f"{name}, output again"]
        assert (outputs.calls, outputs.shallow) == (ours.calls, 0)
