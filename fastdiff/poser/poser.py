"""The decision process, for many episodes at once: one call an expert and step for all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from fastdiff.checks import check_int
from fastdiff.poser.chat import ChatDecomposer
from fastdiff.poser.config import Config, make_critic, make_decomposer
from fastdiff.poser.critics import Critic
from fastdiff.poser.domain import Domain
from fastdiff.poser.embeddings import Embedding, HashedWords, make_embedding
from fastdiff.poser.experts import Expert, make_experts
from fastdiff.poser.ledger import Drawn, Ledger, Told
from fastdiff.poser.records import Critique, Picture, Rules, Step, digest

NO_PICTURE = Critique(0.0, False, ("there is no picture yet, and this expert needs one",))
EXTENDED = 3  # features: attempts, last score, has_image


@dataclass
class Episode:
    """One request on its way.

    todo: commands, the current one first. base: the picture as it was when the current command was begun, which a
    critic compares with: if it were the last attempt, what a failure destroyed would not count as lost in the next.
    score: of the picture by the current command.
    """

    request: str
    commands: tuple[str, ...]
    seed: int
    todo: list[str]
    picture: Picture | None = None
    base: Picture | None = None
    done: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    attempts: int = 0
    score: float = 0.0
    critique: Critique | None = None
    steps: list[Step] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return self.picture.sha if self.picture else ""

    @property
    def ends(self) -> str:
        return self.steps[-1].ends if self.steps else ""


class Poser:
    """Experts, a critic and the rules, put together.

    State: e(current command) and e(remaining commands), 2·size numbers, and of extended rules three more. Action: an
    expert. Reward: the critic's score where it is satisfied, else 0 (a failure that scored would be worth repeating),
    less the step's cost. A command leaves when it is done, or after ``rules.attempts`` failures; the episode ends when
    none is left, or is truncated at ``rules.horizon`` steps. An expert that needs a picture where there is none is not
    called, and has failed.
    """

    def __init__(
        self, experts: Sequence[Expert], critic: Critic, domain: Domain, embedding: Embedding | None = None, *,
        rules: Rules | None = None, ledger: Ledger | None = None, critic_name: str = "critic",
        decomposer: ChatDecomposer | None = None, decomposer_name: str = "decomposer",
    ) -> None:  # fmt: skip
        self.experts, self.critic, self.domain = list(experts), critic, domain
        self.embedding: Embedding = embedding or HashedWords()
        self.rules, self.ledger = rules or Rules(), ledger or Ledger()
        self.critic_name, self.decomposer, self.decomposer_name = critic_name, decomposer, decomposer_name
        self.names = [expert.spec.name for expert in self.experts]
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"experts must have different names; {', '.join(twice)} is there twice")
        if not any(expert.spec.draws for expert in self.experts):
            raise ValueError(
                f"no expert can draw: {', '.join(self.names) or 'there is none'}; one must start from words"
            )

    @classmethod
    def of(
        cls, config: Config | str | os.PathLike[str] | None = None, *, folder: str | os.PathLike[str] | None = None,
        device: str = "auto", **rules: Any,
    ) -> Poser:  # fmt: skip
        """From an experts.toml (None: simulated experts, without delayed effects). folder: of the ledger. rules: in
        place of the file's own.
        """
        config = config if isinstance(config, Config) else Config.read(config)
        try:
            changed = msgspec.convert({**msgspec.to_builtins(config.rules), **rules}, Rules)
        except msgspec.ValidationError as error:
            raise ValueError(f"rules: {error}") from None
        domain = config.domain()
        return cls(
            make_experts(config.expert, domain, device), make_critic(config.critic, domain, device), domain,
            make_embedding(config.words, device), rules=changed,
            ledger=Ledger(config.budget, folder), critic_name=digest(msgspec.to_builtins(config.critic)),
            decomposer=make_decomposer(config.decomposer),
            decomposer_name=digest(msgspec.to_builtins(config.decomposer)),
        )  # fmt: skip

    def changed(self, critic: Critic | None = None, critic_name: str = "", **rules: Any) -> Poser:
        """The same experts, embedding and ledger by other rules, and another critic of a name of its own."""
        other = copy(self)
        other.rules = msgspec.convert({**msgspec.to_builtins(self.rules), **rules}, Rules)
        if critic is not None:
            other.critic, other.critic_name = critic, critic_name
        return other

    # ---- what a policy sees

    @property
    def width(self) -> int:
        """Numbers of an observation."""
        return 2 * self.embedding.size + EXTENDED * self.rules.extended

    def begin(self, request: str, seed: int = 0, *, by_rules: bool = False) -> Episode:
        """An episode of a request, which the decomposer takes apart; where there is none, or by_rules, the domain does.

        TypeError or ValueError for an empty one; BudgetError and ExpertError of the decomposer.
        """
        commands: Sequence[str] = self.domain.split(request)
        if self.decomposer is not None and not by_rules:
            commands = self.ledger.split(self.decomposer, self.decomposer_name, request)
        return Episode(request, tuple(commands), check_int("seed", seed, 0, (1 << 48) - 1), list(commands))

    def observe(self, episodes: Sequence[Episode]) -> Tensor:
        """float32 [B, width] in [-1, 1]."""
        current = self.embedding([e.todo[0] if e.todo else "" for e in episodes])
        remaining = self.embedding([" ".join(e.todo[1:]) for e in episodes])
        more = [[e.attempts / self.rules.attempts, e.score, float(e.picture is not None)] for e in episodes]
        extended = [torch.tensor(more).reshape(-1, EXTENDED)] if self.rules.extended else []
        return torch.cat([current, remaining, *extended], 1)

    def masks(self, episodes: Sequence[Episode]) -> Tensor:
        """bool [B, experts]: those that can be called."""
        draws = torch.tensor([expert.spec.draws for expert in self.experts])
        return draws | torch.tensor([e.picture is not None for e in episodes]).reshape(-1, 1)

    # ---- a step

    def step(
        self, episodes: Sequence[Episode], actions: Sequence[int], q: Sequence[Sequence[float]] = ()
    ) -> list[Step]:
        """Call one expert for each episode, which it changes in place. q: what the policy expected, for the log.

        Raises BudgetError and ExpertError; episodes are then as they were.
        """
        chosen = [self.experts[check_int("action", int(a), 0, len(self.experts) - 1)] for a in actions]
        if not all(e.todo and not e.ends for e in episodes):
            raise ValueError("an episode has ended; begin another")
        able = [i for i, e in enumerate(episodes) if chosen[i].spec.draws or e.picture is not None]
        texts = {i: self._text(episodes[i], chosen[i]) for i in able}
        drawn = self._draw(episodes, {i: chosen[i] for i in able}, texts)
        told: list[Told] = [(drawn[i].picture, (e := episodes[i]).todo[0], e.request, e.base) for i in able]
        rated = dict(zip(able, self.ledger.rate(self.critic, self.critic_name, told), strict=True))
        steps = []
        for i, episode in enumerate(episodes):
            critique, critic_key, paid = rated.get(i, (NO_PICTURE, "", 0.0))
            step = Step(
                request=episode.request, seed=episode.seed, number=len(episode.steps), command=episode.todo[0],
                remaining=tuple(episode.todo[1:]), text=texts.get(i, ""), expert=chosen[i].spec.name,
                options=chosen[i].spec.options, before=episode.sha, after="", attempts=episode.attempts,
                score=episode.score, critique=critique, outcome="", ends="", reward=0.0,
                cost=paid + (drawn[i].cost if i in drawn else 0.0), seconds=drawn[i].seconds if i in drawn else 0.0,
                cached=i in drawn and drawn[i].cached, key=drawn[i].key if i in drawn else "", critic_key=critic_key,
                q=tuple(q[i]) if len(q) else (),
            )  # fmt: skip
            self._advance(episode, step, drawn[i].picture if i in drawn else None)
            steps.append(step)
        return steps

    def _draw(
        self, episodes: Sequence[Episode], chosen: Mapping[int, Expert], texts: Mapping[int, str]
    ) -> dict[int, Drawn]:
        """One call an expert, by the episodes' indices."""
        drawn: dict[int, Drawn] = {}
        for expert in self.experts:
            if group := [i for i in chosen if chosen[i] is expert]:
                seeds = [(episodes[i].seed << 16) + len(episodes[i].steps) for i in group]
                images = [episodes[i].picture for i in group]
                replies = self.ledger.draw(expert, images, [texts[i] for i in group], seeds)
                drawn.update(zip(group, replies, strict=True))
        return drawn

    def _text(self, episode: Episode, expert: Expert) -> str:
        attempt, critique = (episode.attempts, episode.critique) if self.rules.reflection else (0, None)
        return self.domain.word(episode.todo[0], expert.spec, [*episode.done, *episode.dropped], attempt, critique)

    def _advance(self, episode: Episode, step: Step, picture: Picture | None) -> None:
        """What the critique makes of the episode, and of the step's line."""
        rules, critique = self.rules, step.critique
        worse = rules.keep_best and not critique.satisfied and critique.score < episode.score
        if picture is not None and not (worse and episode.picture is not None):
            episode.picture, episode.score = picture, critique.score
        step.after = episode.sha
        step.reward = (critique.score if critique.satisfied else 0.0) - rules.step_cost
        episode.attempts += not critique.satisfied
        dropped = episode.attempts >= rules.attempts
        step.outcome = "done" if critique.satisfied else "dropped" if dropped else "failed"
        episode.critique = None if step.outcome != "failed" else critique
        if step.outcome != "failed":
            (episode.done if critique.satisfied else episode.dropped).append(episode.todo.pop(0))
            episode.attempts, episode.score, episode.base = 0, 0.0, episode.picture
        step.ends = "done" if not episode.todo else "horizon" if len(episode.steps) + 1 >= rules.horizon else ""
        episode.steps.append(step)

    def verdict(self, episodes: Sequence[Episode]) -> list[tuple[bool, ...]]:
        """Whether the final picture satisfies each command of the request, one after another; of no picture, none."""
        told: list[Told] = []
        for e in episodes:
            told += [(e.picture, command, e.request, None) for command in e.commands if e.picture is not None]
        ratings = iter(self.ledger.rate(self.critic, self.critic_name, told))
        return [tuple(e.picture is not None and next(ratings)[0].satisfied for _ in e.commands) for e in episodes]
