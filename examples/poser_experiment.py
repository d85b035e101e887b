"""Is there anything to learn of which expert to call, and is it learned? Writes results.json and results.md.

docs/poser_experiment.md is that page of the simulated experts with delayed effects, docs/poser_emoji.md that of the
packaged models, three seeds each, rendered from examples/poser_experiment.json and examples/poser_emoji.json.

python examples/poser_experiment.py --out experiment [--experts simulated-delayed] [--only table delayed] [--seeds 5]
python examples/poser_experiment.py --out emoji --experts emoji --pool 300 --steps 2500 --validation 64 --one-set
The same command goes on where it ended, and measures only what is not there yet; calls of experts that are no
simulation are kept in the folder, and never made twice. Needs pip install "fastdiff-torch[poser,evaluate]" statsmodels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint, proportions_ztest
from torch import Tensor

from fastdiff.files import atomic_write
from fastdiff.poser.config import Config, second_critic
from fastdiff.poser.critics import Critic, NoisyCritic
from fastdiff.poser.domain import Domain
from fastdiff.poser.evaluate import scores_of
from fastdiff.poser.policy import Policy
from fastdiff.poser.poser import Episode, Poser
from fastdiff.poser.records import digest
from fastdiff.poser.run import Choose, Chosen, Rule, drawing, hand_rule, rollout
from fastdiff.poser.trainer import STEPS, VALIDATION, train
from fastdiff.training.edits import instructions
from fastdiff.training.folder import write_json
from fastdiff.version import __version__

EDITS = ("tone", "style")
KINDS = ("subject", *EDITS)  # of commands
Row = dict[str, Any]


# ---- tests of shares, all of them statsmodels' and scipy's


def interval(hits: int, number: int) -> tuple[float, float]:
    """The exact 95% interval of a share (Clopper & Pearson 1934)."""
    low, high = proportion_confint(hits, number, method="beta")
    return float(low), float(high)


def two_proportions(a: tuple[int, int], b: tuple[int, int]) -> tuple[float, float]:
    """z and the two-sided p of two shares (hits, number) being equal; 0 and 1 where both are none or all."""
    hits, numbers = (a[0], b[0]), (a[1], b[1])
    if sum(hits) in (0, sum(numbers)):
        return 0.0, 1.0
    z, p = proportions_ztest(hits, numbers)
    return float(z), float(p)


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p of wins and losses being equally likely, ties left out; 1 where there is neither."""
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the same order."""
    return [float(p) for p in multipletests(values, method="holm")[1]] if values else []


# ---- what a policy is compared with


def chance(seed: int) -> Choose:
    """Any expert that can be called, each as likely."""
    rng = random.Random(seed)

    def choose(observations: Tensor, masks: Tensor, episodes: Sequence[Episode]) -> Chosen:
        return [rng.choice(mask.nonzero()[:, 0].tolist()) for mask in masks], []

    return choose


def single(poser: Poser, name: str, start: str) -> Rule:
    """One expert for everything."""
    return Rule(poser, dict.fromkeys(KINDS, name), start)


def bandit(poser: Poser, success: Mapping[tuple[str, str], float], start: str) -> Rule:
    """The expert of the highest immediate success for each kind."""
    best = {kind: max(poser.names, key=lambda name: success.get((name, kind), 0.0)) for kind in KINDS}
    return Rule(poser, best, start)


# ---- the experiment

PARTS = ("table", "delayed", "policies", "algorithms", "ablations")
LEARNED = {"QR-DQN": "qr-dqn", "masked PPO": "ppo"}  # beside DQN
FLIPPED = 0.1  # of a noisy critic's verdicts
ABLATIONS: dict[str, Row] = {
    "no reflection": {"reflection": False}, "one attempt": {"attempts": 1}, "step cost 0": {"step_cost": 0.0},
    "noisy critic": {}, "extended observation": {"extended": True},
}  # fmt: skip


@dataclass
class Experiment:
    """What is measured, and how much of it. What was found is kept in ``out``/results.json as soon as it is there, and
    not measured again by the next call with the same settings, which may have more seeds.

    hand: a hand-written rule. second: another critic, of the verdict. cells: calls of an expert for a kind of command.
    seeds: trainings. requests: held-out ones of a seed; one_set: the same ones for every seed, so that rivals, which do
    not depend on it, are called once where the poser's ledger keeps calls. steps, pool, validation: of a training.
    """

    poser: Poser
    hand: Mapping[str, str | list[str]]
    out: Path
    second: Critic | None = None
    cells: int = 200
    seeds: int = 5
    requests: int = 200
    one_set: bool = False
    steps: int = STEPS
    pool: int | None = None
    validation: int = VALIDATION
    told: Callable[[str], object] = print

    def __post_init__(self) -> None:
        specs = digest(*(msgspec.to_builtins(expert.spec) for expert in self.poser.experts))
        settings = {"version": __version__, "experts": self.poser.names, "specs": specs, "cells": self.cells,
                    "requests": self.requests, "one_set": self.one_set, "steps": self.steps, "pool": self.pool,
                    "validation": self.validation, "second": self.second is not None}  # fmt: skip
        self.found: Row = {**settings, "seeds": self.seeds, "minutes": 0.0, "calls": 0}
        self.begun = time.monotonic()
        if (self.out / "results.json").exists():
            there = json.loads((self.out / "results.json").read_text())
            other = [name for name, value in settings.items() if there.get(name) != value]
            if other:
                was = ", ".join(f"{name} {there.get(name)!r}, not {settings[name]!r}" for name in other)
                raise ValueError(f"{self.out} holds another experiment: {was}; name another folder")
            self.found = {**there, "seeds": max(there["seeds"], self.seeds)}
        self.before = self.found["minutes"], self.found["calls"]

    def keep(self, **part: Any) -> None:
        minutes = self.before[0] + (time.monotonic() - self.begun) / 60
        self.found.update(part, minutes=minutes, calls=self.before[1] + self.poser.ledger.calls)
        write_json(self.out / "results.json", self.found)

    @cached_property
    def bases(self) -> dict[str, Row]:
        return {name: pictures(self.poser, name, self.cells) for name in drawing(self.poser)}

    def measure(self, parts: Sequence[str] = PARTS, ablations: Sequence[str] = tuple(ABLATIONS)) -> Row:
        """Some parts, of which those after the table need it; returns all that was found so far."""
        if "table" not in parts and "table" not in self.found:
            raise ValueError(f"the table is not in {self.out / 'results.json'} yet, and comes first")
        if "table" in parts and "table" not in self.found:
            self.told("the table of experts and kinds of command")
            self.keep(table=cells_of(self.poser, self.bases, self.cells))
        if "delayed" in parts and "delayed" not in self.found:
            self.told("delayed effects")
            self.keep(delayed=delayed(self.poser, self.found["table"], self.bases, self.cells))
        for seed in range(self.seeds):
            if "policies" in parts:
                self.compared(seed)
            for name, algorithm in LEARNED.items() if "algorithms" in parts else ():
                self.trained("algorithms", name, seed, algorithm=algorithm)
            for name in ablations if "ablations" in parts else ():
                self.trained("ablations", name, seed, **ABLATIONS[name])
        return self.found

    def asked(self, seed: int) -> list[str]:
        return self.poser.domain.requests(self.requests, 0 if self.one_set else seed, held_out=True)

    def learn(self, poser: Poser, seed: int, algorithm: str = "dqn") -> Policy:
        return train(poser, steps=self.steps, seed=seed, algorithm=algorithm, pool=self.pool,
                     validation=self.validation, told=self.told)  # fmt: skip

    def compared(self, seed: int) -> None:
        """DQN and its rivals."""
        poser, seen = self.poser, self.found.get("policies", {})
        if len(seen.get("DQN", ())) > seed:
            return
        self.told(f"seed {seed}: DQN, and what it is compared with")
        asked, table = self.asked(seed), self.found["table"]
        policy = self.learn(poser, seed)
        policy.save(self.out / f"policy-{seed}.safetensors")
        rivals = {"DQN": policy.choose, **_rivals(poser, self.hand, table, seed)}
        rows = {name: self.scores(poser, choose, asked) for name, choose in rivals.items()}
        rows |= {f"merged {name}": self.row(poser, _merged(poser, name, asked)) for name in drawing(poser)}
        rows["oracle"] = self._oracle(asked)
        for name, row in rows.items():
            seen.setdefault(name, []).append(row)
        self.keep(policies=seen, against=against(seen))

    def trained(self, part: str, name: str, seed: int, algorithm: str = "dqn", **rules: Any) -> None:
        """A policy that was learned otherwise, rated as DQN's."""
        seen = self.found.get(part, {})
        if len(seen.get(name, ())) > seed:
            return
        self.told(f"seed {seed}: {name}")
        noisy = NoisyCritic(self.poser.critic, FLIPPED, seed) if name == "noisy critic" else None
        poser = self.poser.changed(noisy, f"{self.poser.critic_name} {FLIPPED} {seed}", **rules)
        policy = self.learn(poser, seed, algorithm)
        seen.setdefault(name, []).append(self.scores(poser, policy.choose, self.asked(seed)))
        self.keep(**{part: seen})

    def scores(self, poser: Poser, choose: Choose, asked: Sequence[str]) -> Row:
        return self.row(poser, rollout(poser, choose, asked, seed=1 << 30))

    def row(self, poser: Poser, episodes: Sequence[Episode]) -> Row:
        """The verdict is always the critic's own, without noise."""
        judge = poser.changed(self.poser.critic, self.poser.critic_name)
        return msgspec.to_builtins(scores_of(judge, episodes, self.second))

    def _oracle(self, asked: Sequence[str]) -> Row:
        """The best rule in hindsight: every drawing expert with the two best a kind, chosen on these requests."""
        poser, success = self.poser, shares(self.found["table"])
        ranked = {kind: sorted(poser.names, key=lambda name: -success.get((name, kind), 0.0))[:2] for kind in EDITS}
        rows = []
        for names in itertools.product(drawing(poser), *(ranked[kind] for kind in EDITS)):
            rule = Rule(poser, dict(zip(KINDS, names, strict=True)), names[0])
            rows.append({**self.scores(poser, rule, asked), "rule": ", ".join(names)})
        return max(rows, key=lambda row: sum(row["whole"]))


def _trials(poser: Poser, name: str, episodes: Sequence[Episode]) -> list[Episode]:
    """One call of an expert for each episode; the episodes afterwards."""
    action = poser.names.index(name)
    for start in range(0, len(episodes), 64):
        part = episodes[start : start + 64]
        poser.step(part, [action] * len(part))
    return list(episodes)


def _hits(episodes: Sequence[Episode]) -> int:
    return sum(episode.steps[-1].outcome == "done" for episode in episodes)


# ---- 1, the table


def pictures(poser: Poser, name: str, number: int) -> Row:
    """What an expert draws of some subjects: all of its tries, and those that came out as asked."""
    subjects = [random.Random(i).choice(poser.domain.values["subject"]) for i in range(number)]
    tries = _trials(poser, name, [poser.begin(f"draw a {subject}", i) for i, subject in enumerate(subjects)])
    return {"hits": _hits(tries), "number": number, "seconds": _seconds(tries), "right": [e for e in tries if e.done]}


def _edit(base: Episode, domain: Domain, kinds: Sequence[str], seed: int) -> Episode:
    """A drawn episode with commands to come, one a kind, about values drawn by the seed."""
    rng = random.Random(seed)
    goal = {name: rng.choice(domain.values[name]) for name in EDITS}
    commands = [rng.choice(instructions(goal, [kind])) for kind in kinds]
    request = ", then ".join([*base.commands, *commands])
    return Episode(request, (*base.commands, *commands), seed, commands, base.picture, base.picture, [*base.done])


def _edits(poser: Poser, bases: Row, kinds: Sequence[str], number: int) -> list[Episode]:
    """Episodes that stand before an edit; what was drawn right is taken in turn."""
    right = bases["right"]
    return [_edit(right[i % len(right)], poser.domain, kinds, 1 << 20 | i) for i in range(number)] if right else []


def cells_of(poser: Poser, bases: Mapping[str, Row], number: int) -> list[Row]:
    cells: list[Row] = []
    for name, base in bases.items():
        about = {key: base[key] for key in ("hits", "number", "seconds")}
        cells.append({"expert": name, "kind": "subject", "after": "", **about})
    for name, kind, (after, base) in itertools.product(poser.names, EDITS, bases.items()):
        if name in bases and after != next(iter(bases)):
            continue  # what draws anew does not look at what was there
        if tries := _trials(poser, name, _edits(poser, base, [kind], number)):
            cells.append({"expert": name, "kind": kind, "after": after, "seconds": _seconds(tries),
                          "hits": _hits(tries), "number": len(tries)})  # fmt: skip
    prices = {expert.spec.name: expert.spec.price for expert in poser.experts}
    return [{**c, "interval": interval(c["hits"], c["number"]), "price": prices[c["expert"]]} for c in cells]


def _seconds(episodes: Sequence[Episode]) -> float | None:
    """Of a call, where at least one was made and not taken from a folder."""
    found = [e.steps[-1].seconds for e in episodes if e.steps and not e.steps[-1].cached]
    return sum(found) / len(found) if found else None


def shares(table: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Immediate success by (expert, kind), over all that drew before."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for cell in table:
        hits, number = sums.get((cell["expert"], cell["kind"]), (0, 0))
        sums[cell["expert"], cell["kind"]] = hits + cell["hits"], number + cell["number"]
    return {key: hits / number for key, (hits, number) in sums.items()}


# ---- 2, delayed effects


def delayed(poser: Poser, table: Sequence[Row], bases: Mapping[str, Row], number: int) -> list[Row]:
    """Tests that what is called now matters later, two shares each; p is Holm-corrected over all of them."""
    tests: list[Row] = []

    def test(about: str, what: str, a: tuple[int, int], b: tuple[int, int]) -> None:
        if a[1] and b[1]:
            z, p = two_proportions(a, b)
            tests.append({"about": about, "what": what, "a": a, "b": b, "z": z, "raw": p})

    by = {(c["expert"], c["kind"], c["after"]): (c["hits"], c["number"]) for c in table}
    editors = [name for name in poser.names if name not in bases]
    for name, kind, (one, other) in itertools.product(editors, EDITS, itertools.combinations(bases, 2)):
        if (name, kind, one) in by and (name, kind, other) in by:
            what = f"{name}, {kind}: after {one}, after {other}"
            test("drawn before", what, by[name, kind, one], by[name, kind, other])
    base = max(bases.values(), key=lambda each: each["hits"])
    for name in editors:  # one call for two commands, or two calls
        both = _edits(poser, base, EDITS, number)
        for episode in both:
            episode.todo[:] = [" and ".join(episode.todo)]
        one_call = _hits(_trials(poser, name, both)), len(both)
        test("two in one", f"{name}: both in one call, in two", one_call,
             _in_turn(poser, (name, name), base, EDITS, number))  # fmt: skip
    if editors:
        success = shares(table)
        best = {kind: max(editors, key=lambda name: success.get((name, kind), 0.0)) for kind in EDITS}
        done = [_in_turn(poser, [best[k] for k in order], base, order, number) for order in (EDITS, EDITS[::-1])]
        test("order", f"{best['tone']} and {best['style']}: tone first, style first", *done)
    return [{**each, "p": p} for each, p in zip(tests, holm([each["raw"] for each in tests]), strict=True)]


def _in_turn(poser: Poser, names: Sequence[str], base: Row, kinds: Sequence[str], number: int) -> tuple[int, int]:
    """How often two calls, one a command, carry out both, in the final picture; of how many."""
    episodes = _trials(poser, names[0], _edits(poser, base, kinds, number))
    went_on = _trials(poser, names[1], [episode for episode in episodes if episode.steps[-1].outcome == "done"])
    return sum(all(each) for each in poser.verdict([e for e in went_on if not e.todo])), len(episodes)


def has_delayed_effect(tests: Sequence[Row]) -> bool:
    """Whether what was drawn before, or the order, changes what comes after (p < 0.05, corrected)."""
    return any(test["p"] < 0.05 for test in tests if test["about"] != "two in one")


# ---- 3, policies


def _rivals(poser: Poser, hand: Mapping[str, str | list[str]], table: Sequence[Row], seed: int) -> dict[str, Choose]:
    success = shares(table)
    start = max(drawing(poser), key=lambda name: success.get((name, "subject"), 0.0))
    rivals: dict[str, Choose] = {"random": chance(seed)}
    rivals |= {f"only {name}": single(poser, name, start) for name in poser.names}
    if (rule := hand_rule(poser, hand)) is not None:
        rivals["hand rule"] = rule
    return {**rivals, "bandit": bandit(poser, success, start)}


def _merged(poser: Poser, name: str, asked: Sequence[str]) -> list[Episode]:
    """Finished episodes of an expert that draws, given all of the request as one caption."""
    action, episodes = poser.names.index(name), []
    for i, request in enumerate(asked):
        episode = poser.begin(request, i)
        episode.todo = [poser.domain.caption(poser.domain.goals(episode.commands))]
        episodes.append(episode)
    live = episodes
    while live:
        poser.step(live, [action] * len(live))
        live = [episode for episode in live if not episode.ends]
    return episodes


def against(seen: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """DQN's wins, ties and losses, a request each, against the others, a seed each; p is Holm-corrected in a seed."""
    names = [name for name in seen if name != "DQN"]
    rows: dict[str, list[Row]] = {name: [] for name in names}
    for seed, ours in enumerate(seen["DQN"]):
        for name in names:
            pairs = list(zip(ours["whole"], seen[name][seed]["whole"], strict=True))
            wins, losses = pairs.count((True, False)), pairs.count((False, True))
            rows[name].append({"wins": wins, "ties": len(pairs) - wins - losses, "losses": losses})
        raw = [sign_test(rows[name][seed]["wins"], rows[name][seed]["losses"]) for name in names]
        for name, p in zip(names, holm(raw), strict=True):
            rows[name][seed]["p"] = p
    return rows


# ---- the page: no number in it is typed by hand


def render(found: Row) -> str:
    about = (
        f"Rendered by `python examples/poser_experiment.py` from results.json, fastdiff {found['version']}: "
        f"{found['minutes']:.0f} minutes, {found['calls']} calls of {', '.join(found['experts'])}."
    )
    parts = {"table": _table, "delayed": _delayed, "policies": _policies, "algorithms": _algorithms,
             "ablations": _ablations}  # fmt: skip
    there = [write(found) for part, write in parts.items() if part in found]
    return "\n\n".join(["# Which expert for which command, measured", about, *there]) + "\n"


def _lines(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def _table(found: Row) -> str:
    rows = [
        (c["expert"], c["kind"], c["after"] or "nothing", f"{c['hits'] / c['number']:.3f}",
         "{:.3f}–{:.3f}".format(*c["interval"]), c["number"], f"{c['price']:g}", _short(c["seconds"]))
        for c in found["table"]
    ]  # fmt: skip
    head = ("expert", "command", "drawn by", "success", "95% interval", "calls", "price", "seconds")
    return "\n\n".join(["## 1. Experts and commands", _lines(head, rows)])


def _delayed(found: Row) -> str:
    rows = [
        (t["about"], t["what"], *(f"{x[0]}/{x[1]}" for x in (t["a"], t["b"])), f"{t['z']:.2f}", f"{t['p']:.2g}")
        for t in found["delayed"]
    ]
    verdict = (
        "There is a delayed effect: what is called now changes what succeeds later, so that planning can pay."
        if has_delayed_effect(found["delayed"])
        else "No delayed effect was found: the problem is a bandit; the best immediate choice is all there is to learn."
    )
    head = ("test", "shares compared", "first", "second", "z", "p (Holm)")
    return "\n\n".join(["## 2. Is there anything to learn?", verdict, _lines(head, rows)])


def _short(seconds: float | None) -> str:
    return "cached" if seconds is None else f"{seconds:.3f}" if seconds >= 0.0005 else "0"


def _share(row: Row, by: str = "whole") -> float:
    return sum(row[by]) / len(row[by])


HEAD = ("policy", "all done, by seed", "mean", "commands done", "damage", "steps", "calls", "price")


def _row(name: str, rows: Sequence[Row]) -> list[str]:
    """A policy's line; what the second judge says, where there is one, at its end."""
    line = [name, " ".join(f"{_share(row):.3f}" for row in rows), f"{sum(map(_share, rows)) / len(rows):.3f}"]
    line += [f"{sum(r[key] for r in rows) / len(rows):.2f}" for key in ("share", "damage", "steps", "calls", "price")]
    second = [_share(row, "second") for row in rows if row["second"] is not None]
    return [*line, f"{sum(second) / len(second):.3f}"] if second else line


def _beside(found: Row, part: str) -> str:
    """Policies of a part, each with its wins, ties and losses beside DQN's of the same seeds."""
    theirs = found[part]
    seeds = min(len(rows) for rows in [found.get("policies", {}).get("DQN", []), *theirs.values()])
    head = (*HEAD, *(["second judge"] if found["second"] else []))
    dqn = found["policies"]["DQN"] if seeds else []
    rows = [_row(name, rows) for name, rows in {**({"DQN": dqn} if seeds else {}), **theirs}.items()]
    if not seeds:
        return _lines(head, rows)
    versus = against({"DQN": dqn[:seeds], **{name: rows[:seeds] for name, rows in theirs.items()}})
    return "\n\n".join([_lines(head, rows), VERSUS, _versus(versus)])


def _algorithms(found: Row) -> str:
    about = "The same steps, and the same plain policy afterwards, learned otherwise."
    parts = ["## 4. Other algorithms", about, _beside(found, "algorithms")]
    for name, rows in found["algorithms"].items() if "policies" in found else ():
        if len(rows) == len(found["policies"]["DQN"]):  # in DQN's place among its rivals
            seen = {**found["policies"], "DQN": rows}
            reached = bars({**found, "policies": seen, "against": against(seen)})
            parts += [f"{name} in DQN's place:", "\n".join(f"- {line}" for line in reached)]
    return "\n\n".join(parts)


def _ablations(found: Row) -> str:
    about = (
        "DQN trained and run with one thing otherwise. A noisy critic turns a verdict into its opposite with a chance"
        f" of {FLIPPED:g}, while training and while running; the verdict on the final picture has no noise."
    )
    return "\n\n".join(["## 5. Ablations", about, _beside(found, "ablations")])


VERSUS = "DQN's wins, ties and losses by seed; exact binomial p without ties, Holm-corrected in a seed:"


def _versus(rivals: Mapping[str, list[Row]]) -> str:
    rows = [
        (
            name,
            " ".join(f"{r['wins']}/{r['ties']}/{r['losses']}" for r in rows),
            " ".join(f"{r['p']:.1g}" for r in rows),
        )
        for name, rows in rivals.items()
    ]
    return _lines(("against", "win/tie/loss", "p"), rows)


def _policies(found: Row) -> str:
    seen = found["policies"]
    judges = (
        "the verdict on the final picture is by the critic that rewards"
        + (", and by another judge in the last column (EfficientNet's features)" if found["second"] else "")
    )  # fmt: skip
    drawn = "the same" if found["one_set"] else "other"
    pool = f", of {found['pool']} requests" if found["pool"] else ""
    about = (
        f"{len(seen['DQN'])} seeds of {found['steps']} steps{pool}, {found['requests']} held-out requests each,"
        f" {drawn} ones a seed; {judges}. Steps, calls and price are a request's."
    )
    head = (*HEAD, *(["second judge"] if found["second"] else []))
    return "\n\n".join(
        ["## 3. Policies", about, _lines(head, [_row(name, rows) for name, rows in seen.items()]), VERSUS,
         _versus(found["against"]), "\n".join(f"- {line}" for line in bars(found))]
    )  # fmt: skip


def bars(found: Row) -> list[str]:
    """What was to be reached, and whether it was."""
    seen, versus = found["policies"], found["against"]
    ours = [_share(row) for row in seen["DQN"]]
    weak = [name for name in versus if name == "random" or name.startswith("only ")]

    def beaten(name: str, p: float) -> bool:
        return all(r["wins"] > r["losses"] and r["p"] < p for r in versus[name])

    def line(reached: bool, text: str) -> str:
        return f"{'reached' if reached else 'missed'}: {text}"

    missed = [name for name in weak if not beaten(name, 0.01)]
    than = f"; not than {', '.join(missed)}" if missed else ""
    oracle = min(a / max(_share(b), 1e-9) for a, b in zip(ours, seen["oracle"], strict=True))
    lines = [
        line(not missed, f"better than chance and every single expert on every seed, p < 0.01{than}"),
        line(oracle >= 0.95, f"at least 0.95 of the oracle on every seed; least {oracle:.3f}"),
    ]
    for name in ("bandit", "hand rule"):
        if name in seen:
            least = min(a - _share(b) for a, b in zip(ours, seen[name], strict=True))
            lines.append(
                line(least >= -0.02, f"not below the {name} by more than 0.02 on any seed; least {least:+.3f}")
            )
    if has_delayed_effect(found["delayed"]):
        lines.append(line(beaten("bandit", 0.05), "above the bandit on every seed, p < 0.05, as there is an effect"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of results.json, results.md, the policies")
    parser.add_argument("--experts", default="simulated-delayed", help="as of fastdiff poser")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)}; what is there is kept")  # fmt: skip
    parser.add_argument("--ablations", nargs="+", choices=tuple(ABLATIONS), default=tuple(ABLATIONS), metavar="NAME",
                        help=f"of {', '.join(map(repr, ABLATIONS))}")  # fmt: skip
    parser.add_argument("--cells", type=int, default=200, help="calls of each expert for each kind of command")
    parser.add_argument("--seeds", type=int, default=5, help="trainings, each with its own requests")
    parser.add_argument("--requests", type=int, default=200, help="held-out requests of each")
    parser.add_argument("--one-set", action="store_true", help="the same held-out requests for every seed")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a training")
    parser.add_argument("--pool", type=int, help="requests, with a seed each, of all trainings; calls come again")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="requests that select a training's policy")
    parser.add_argument("--no-second", action="store_true", help="no second judge")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    config = Config.read(chosen.experts)
    simulated = config.critic.kind == "simulated"
    # A call of a simulated expert is quicker than a look into a folder.
    poser = Poser.of(config, folder=None if simulated else chosen.out / "calls")
    second = None if chosen.no_second else second_critic(config.critic, poser.domain)
    Experiment(poser, config.hand, chosen.out, second, cells=chosen.cells, seeds=chosen.seeds,
               requests=chosen.requests, one_set=chosen.one_set, steps=chosen.steps, pool=chosen.pool,
               validation=chosen.validation).measure(chosen.only, chosen.ablations)  # fmt: skip
    text = render(json.loads((chosen.out / "results.json").read_text()))
    with atomic_write(chosen.out / "results.md") as file:
        file.write(text.encode())


if __name__ == "__main__":
    main()
