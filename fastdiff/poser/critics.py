"""Critics: what rates a picture by one command, and says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.evaluation.judge import Judge
from fastdiff.poser.domain import Domain, Goal
from fastdiff.poser.records import Critique, Picture, digest

Previous = Sequence[Tensor | None]


class Critic(Protocol):
    price: float  # of a rating

    def rate(
        self, images: Tensor, commands: Sequence[str], requests: Sequence[str], previous: Previous
    ) -> list[Critique]:
        """A critique of each picture [B, 3, H, W].

        commands: the one that was just tried. requests: each whole, whose other parts must not suffer. previous: the
        picture as it was before the first try of the command, None for none. Raises ExpertError where a call fails or
        its answer is no critique.
        """
        ...


class DomainCritic:
    """Knows what each factor of a picture is: "satisfied" where those of the command are as asked, and those that the
    request asks for elsewhere, and that were right before, still are. The score is the share of these that are right.

    see: what pictures show, one goal each; it is given what is wanted, to decide between pictures that look the same.
    """

    price = 0.0

    def __init__(self, domain: Domain, see: Callable[[Tensor, Sequence[Goal]], list[Goal]]) -> None:
        self.domain, self.see = domain, see
        self._whole = lru_cache(1 << 12)(lambda request: domain.goals(domain.split(request)))

    def rate(
        self, images: Tensor, commands: Sequence[str], requests: Sequence[str], previous: Previous
    ) -> list[Critique]:
        asked = [self.domain.goal(command) for command in commands]
        whole = [self._whole(request) for request in requests]
        kept = self._right_before(asked, whole, previous)
        wanted = [{**keep, **goal} for keep, goal in zip(kept, asked, strict=True)]
        return [self._of(*each) for each in zip(self.see(images, wanted), asked, wanted, strict=True)]

    def _right_before(self, asked: Sequence[Goal], whole: Sequence[Goal], previous: Previous) -> list[Goal]:
        others = [{n: v for n, v in w.items() if n not in goal} for w, goal in zip(whole, asked, strict=True)]
        there = [i for i, image in enumerate(previous) if image is not None]
        kept: list[Goal] = [{} for _ in previous]
        if there:
            before = self.see(torch.stack([p for p in previous if p is not None]), [others[i] for i in there])
            for i, seen in zip(there, before, strict=True):
                kept[i] = {name: value for name, value in others[i].items() if seen.get(name) == value}
        return kept

    def _of(self, seen: Goal, asked: Goal, wanted: Goal) -> Critique:
        if not asked:
            return Critique(
                0.0, False, ("command: it is not about a subject, a tone or a style that this critic knows",)
            )
        wrong = [name for name, value in wanted.items() if seen.get(name) != value]
        named = {name: (seen.get(name) or "yellow", wanted[name] or "yellow") for name in wrong}
        issues = tuple(f"{name}: it is {is_now}, not {should}" for name, (is_now, should) in named.items())
        mend = self.domain.instruction({name: wanted[name] for name in wrong}) if wrong else ""
        return Critique(1 - len(wrong) / len(wanted), not wrong, issues, mend)


class NoisyCritic:
    """Another critic, whose verdict is turned into its opposite by a chance, for studies of what noise does.

    flip: the chance. seed: of it; the same picture and command have the same verdict whenever they are asked about.
    """

    def __init__(self, critic: Critic, flip: float, seed: int = 0) -> None:
        self.critic, self.flip, self.seed, self.price = critic, flip, seed, critic.price

    def rate(
        self, images: Tensor, commands: Sequence[str], requests: Sequence[str], previous: Previous
    ) -> list[Critique]:
        rated = self.critic.rate(images, commands, requests, previous)
        shas = [picture.sha for picture in Picture.batch(images)]
        return [self._of(*each) for each in zip(rated, shas, commands, requests, strict=True)]

    def _of(self, critique: Critique, *about: str) -> Critique:
        if int(digest(self.seed, *about)[:8], 16) / 2**32 >= self.flip:
            return critique
        if critique.satisfied:
            return Critique(0.0, False, ("other: the critic is noisy",))
        return Critique(1.0, True)


def simulated_critic(domain: Domain) -> DomainCritic:
    from fastdiff.poser.simulated import shown

    return DomainCritic(domain, lambda images, wanted: shown(images, domain))


def emoji_critic(judge: Judge, rows: Sequence[Mapping[str, Any]], domain: Domain) -> DomainCritic:
    """The exact judge: a picture shows what the real one shows that it is nearest to.

    judge: of all rows of the data, in their order.
    """
    places = {tuple(row[name] for name in domain.values): i for i, row in enumerate(rows)}

    def see(images: Tensor, wanted: Sequence[Goal]) -> list[Goal]:
        nearest = judge.judge(images, torch.zeros(len(images), dtype=torch.int64)).nearest.tolist()
        goals = [{name: rows[i][name] for name in domain.values} for i in nearest]
        better = [{**goal, **want} for goal, want in zip(goals, wanted, strict=True)]
        # Some pictures of two cells look the same; the judge takes the one that is asked for.
        targets = [places.get(tuple(goal.values()), i) for goal, i in zip(better, nearest, strict=True)]
        hits = judge.judge(images, torch.tensor(targets)).hits["exact"].tolist()
        return [rows[t] if hit else goal for goal, t, hit in zip(goals, targets, hits, strict=True)]

    return DomainCritic(domain, see)
