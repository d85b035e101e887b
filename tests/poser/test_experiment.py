"""The statistics beside formulas, delayed effects where they are and are not, and the page out of the file."""

import json
import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("statsmodels")
pytest.importorskip("stable_baselines3")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if not (EXAMPLES / "poser_experiment.py").exists():
    pytest.skip("no examples beside the tests", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))
import poser_experiment as experiment  # noqa: E402
from poser_experiment import holm, interval, sign_test, two_proportions  # noqa: E402

from fastdiff.poser.config import Config  # noqa: E402
from fastdiff.poser.evaluate import scores_of  # noqa: E402
from fastdiff.poser.poser import Poser  # noqa: E402
from fastdiff.poser.records import Picture  # noqa: E402
from fastdiff.poser.simulated import paint  # noqa: E402


def tail(hits, number, share):
    """P(X ≤ hits) of a binomial."""
    return sum(math.comb(number, k) * share**k * (1 - share) ** (number - k) for k in range(hits + 1))


def test_statistics_are_what_their_formulas_say():
    for hits, number in ((0, 10), (3, 10), (10, 10), (188, 200)):
        low, high = interval(hits, number)
        assert 0 <= low <= hits / number <= high <= 1
        if hits < number:
            assert tail(hits, number, high) == pytest.approx(0.025, rel=1e-6)
        if hits:
            assert 1 - tail(hits - 1, number, low) == pytest.approx(0.025, rel=1e-6)
    z, p = two_proportions((150, 200), (100, 200))
    assert z == pytest.approx(0.25 / math.sqrt(0.625 * 0.375 * 2 / 200))
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)))
    assert two_proportions((0, 5), (0, 9)) == two_proportions((5, 5), (9, 9)) == (0.0, 1.0)
    assert sign_test(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert sign_test(0, 0) == 1
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def parts(name, number=200):
    process = Poser.of(name)
    bases = {expert: experiment.pictures(process, expert, number) for expert in ("fast", "slow")}
    table = experiment.cells_of(process, bases, number)
    return process, table, experiment.delayed(process, table, bases, number)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simulated", "simulated-delayed"])
def test_the_table_and_delayed_effects(name):
    """Shares lie where the simulation's table puts them, at fixed seeds; effects are found exactly where they are."""
    process, table, tests = parts(name)
    by = {(c["expert"], c["kind"], c["after"]): c for c in table}
    assert set(by) == {("fast", "subject", ""), ("slow", "subject", "")} | {
        (e, k, a) for e in process.names for k in ("tone", "style") for a in ("fast", "slow")
        if e not in ("fast", "slow") or a == "fast"
    }  # fmt: skip
    delayed = name == "simulated-delayed"
    assert experiment.has_delayed_effect(tests) == delayed
    already = 1 / 6  # of six tones: what is asked for may be there by chance
    for after, quality in (("fast", 0.45 if delayed else 1.0), ("slow", 1.0)):
        cell = by["tone", "tone", after]
        truth = 0.95 * quality + (1 - 0.95 * quality) * already
        assert interval(cell["hits"], 200) == cell["interval"]
        assert abs(cell["hits"] / 200 - truth) < 4 * math.sqrt(truth * (1 - truth) / 200) + 0.005
    found = {t["what"].split(":")[0] for t in tests if t["about"] == "drawn before" and t["p"] < 0.05}
    assert ({"tone, tone", "style, style"} <= found) if delayed else not found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_experiment_as_a_whole(tmp_path):
    """Small: every part is in the file, its numbers hang together, and the page is rendered from it alone."""
    pytest.importorskip("sb3_contrib")
    process, told = Poser.of("simulated-delayed"), []
    how = {"cells": 12, "seeds": 2, "requests": 8, "steps": 48, "validation": 8, "pool": 20, "told": told.append}
    hand = Config.read("simulated-delayed").hand
    with pytest.raises(ValueError, match=r"the table is not in .* yet, and comes first"):
        experiment.Experiment(process, hand, tmp_path, process.critic, **how).measure(["policies"])
    experiment.Experiment(process, hand, tmp_path, process.critic, **how).measure(["table", "delayed"])
    assert "policies" not in json.loads((tmp_path / "results.json").read_text())
    experiment.Experiment(process, hand, tmp_path, process.critic, **how).measure(ablations=["one attempt"])
    experiment.Experiment(process, hand, tmp_path, process.critic, **how).measure(ablations=["noisy critic"])
    found = json.loads((tmp_path / "results.json").read_text())
    calls, lines = process.ledger.calls, len(told)
    experiment.Experiment(process, hand, tmp_path, process.critic, **how).measure(
        ablations=["one attempt", "noisy critic"]
    )  # all of it is there
    assert (process.ledger.calls, len(told)) == (calls, lines)
    with pytest.raises(ValueError, match="holds another experiment: cells 12, not 13"):
        experiment.Experiment(process, hand, tmp_path, process.critic, **{**how, "cells": 13})
    assert {name: len(rows) for name, rows in found["ablations"].items()} == {"one attempt": 2, "noisy critic": 2}
    assert {name: len(rows) for name, rows in found["algorithms"].items()} == {"QR-DQN": 2, "masked PPO": 2}
    assert all(row["second"] == row["whole"] for rows in found["policies"].values() for row in rows)
    assert all(row["steps"] <= 3 for row in found["ablations"]["one attempt"])  # a try a command
    text = experiment.render(found)
    assert found["policies"].keys() > {"DQN", "random", "bandit", "hand rule", "oracle", "merged fast", "only tone"}
    for name, rows in found["policies"].items():
        assert len(rows) == 2
        assert f"| {name} |" in text
        for seed, row in enumerate(rows):
            assert len(row["whole"]) == 8
            if name != "DQN":
                against = found["against"][name][seed]
                assert against["wins"] + against["ties"] + against["losses"] == 8
                ours = sum(found["policies"]["DQN"][seed]["whole"])
                assert against["wins"] - against["losses"] == ours - sum(row["whole"])
    assert text.count("| second judge |") == 3
    for heading in ("1. Experts", "2. Is there", "3. Policies", "4. Other", "5. Ablations"):
        assert f"## {heading}" in text
    assert (tmp_path / "policy-1.safetensors").exists()


def verdict(ours, others, tests):
    row = {"share": 1.0, "damage": 0.0, "steps": 1.0, "calls": 1.0, "price": 0.0}
    seen = {name: [{**row, "whole": [True] * k + [False] * (100 - k)}] for name, k in {"DQN": ours, **others}.items()}
    return experiment.bars({"policies": seen, "against": experiment.against(seen), "delayed": tests})


def test_the_page_says_what_was_missed():
    effect = [{"about": "drawn before", "p": 0.001}]
    rivals = {"random": 40, "only a": 50, "bandit": 60, "hand rule": 95, "oracle": 96}
    assert [line.split(":")[0] for line in verdict(95, rivals, effect)] == ["reached"] * 5
    low = verdict(55, rivals, effect)
    assert [line.split(":")[0] for line in low] == ["missed"] * 5
    assert "not than only a" in low[0]
    assert len(verdict(95, rivals, [{"about": "two in one", "p": 0.001}])) == 4


@pytest.mark.parametrize("name", ["poser_experiment", "poser_emoji"])
def test_the_page_is_of_the_file(name):
    """docs/poser_experiment.md and docs/poser_emoji.md are what the measured files say, which are whole."""
    found = json.loads((EXAMPLES / f"{name}.json").read_text())
    assert (EXAMPLES.parent / "docs" / f"{name}.md").read_text(encoding="utf-8") == experiment.render(found)
    assert [len(rows) for rows in found["policies"].values()] == [found["seeds"]] * len(found["policies"])
    for name, rows in experiment.against(found["policies"]).items():
        for mine, kept in zip(rows, found["against"][name], strict=True):
            assert mine == {**kept, "p": pytest.approx(kept["p"])}


def test_damage_is_what_was_done_and_is_gone():
    """Two commands done, of which the final picture shows one."""
    process = Poser.of()
    episode = process.begin("draw a pilot, then make the skin dark")
    episode.done = list(episode.commands)
    goal = {"subject": "cook", "tone": "dark", "style": "flat"}
    episode.picture = Picture.batch(paint(goal, 1.0, process.domain)[None])[0]
    row = scores_of(process, [episode], process.critic)
    assert (row.damage, row.share, row.whole, row.second) == (1.0, 0.5, [False], [False])
