"""The page of other accelerations: what it says won, and that it is the one that its figures make."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "composition_page.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="no examples beside the tests")


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("composition_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks
    spec.loader.exec_module(module)
    return module


def row(name, psnr, exact=None, cost=0.5, **more):
    told = {"name": name, "calls": 20, "whole": 20, "cost": [cost, cost - 0.01, cost + 0.01], "psnr": psnr, **more}
    return told | ({} if exact is None else {"exact": exact})


def test_the_nearer_one_wins(page):
    exact = row("exact", None, [0.9, 0.8, 1.0])
    for psnr, said in ((31.0, "**it wins** by PSNR, 31.0 dB against 30.0 in 10 steps"),
                       (29.0, "**fewer steps win** by PSNR, 29.0 dB against 30.0 in 10 steps")):  # fmt: skip
        plain = row(f"{page.FEWER}, 10", 30.0, [0.6, 0.5, 0.7], calls=10, whole=10)
        apart = page.verdicts([exact, row("DeepCache", psnr, [0.9, 0.8, 0.95]), plain])
        assert said in apart
        assert apart.endswith("exact cells, 0.90 against 0.60, differ by more than chance.\n")
        alike = page.verdicts([exact, row("DeepCache", psnr, [0.65, 0.55, 0.75]), plain])
        assert alike.endswith("do not differ by more than chance.\n")


def test_what_costs_as_much_brings_nothing(page):
    rows = [row("exact", None), row("torchao", 40.0, cost=1.2), {"name": "other", "fails": "OSError: no kernel"}]
    assert page.verdicts(rows) == "- torchao: brings nothing, at 1.20 of the exact call's cost.\n"
    assert "| other | fails: OSError: no kernel |" in page.table(rows)
    with_judge = page.table([row("exact", None, [0.9, 0.8, 1.0])]).splitlines()
    assert len({line.count("|") for line in with_judge}) == 1


@pytest.fixture
def kept(page):
    """The figures that were measured."""
    return json.loads(page.KEPT.read_text(encoding="utf-8"))


def test_the_page_is_the_one_that_its_figures_make(page, kept):
    assert page.PAGE.read_text(encoding="utf-8") == page.render(kept)


def test_every_method_stands_beside_fewer_steps(page, kept):
    for name in page.STUDIES.keys() & kept.keys():
        rows = kept[name]
        for one, after in zip(rows[1:], [*rows[2:], {"name": ""}], strict=True):
            if "fails" not in one and not one["name"].startswith(page.FEWER) and one["cost"][0] <= page.NO_GAIN:
                assert after["name"].startswith(page.FEWER)
