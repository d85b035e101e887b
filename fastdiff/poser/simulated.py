"""Simulated experts: success by a table, with or without delayed effects, for tests and for study.

A picture of theirs, 8 × 8 pixels, says what it shows: the brightness of a band is a factor's value, the lowest band the
quality that it was drawn with. Experts, critics, caches and pages handle it as any picture.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from fastdiff.poser.domain import Domain, Goal
from fastdiff.poser.records import Spec

SIDE = 8


class Simulation(msgspec.Struct, forbid_unknown_fields=True):
    """The options of a simulated expert. success: by factor, the chance that it comes out as asked. damage: the chance
    that another factor changes. quality: in [0, 1], of what it draws. fragile: an editor's chance is multiplied by the
    quality of the picture that it is given, which is the delayed effect.
    """

    success: dict[str, float]
    damage: float = 0.0
    quality: float = 1.0
    fragile: bool = False


class SimulatedExpert:
    def __init__(self, spec: Spec, domain: Domain) -> None:
        self.spec, self.domain = spec, domain
        try:
            self.options = msgspec.convert(spec.options, Simulation)
        except msgspec.ValidationError as error:
            raise ValueError(f"options of {spec.name}: {error}") from None

    def run(self, images: Tensor | None, commands: Sequence[str], seeds: Sequence[int]) -> Tensor:
        before = [({name: v[0] for name, v in self.domain.values.items()}, self.options.quality)] * len(commands)
        if images is not None and not self.spec.draws:
            before = list(zip(shown(images, self.domain), quality(images), strict=True))
        return torch.stack([self._one(*each) for each in zip(before, commands, seeds, strict=True)])

    def _one(self, before: tuple[Goal, float], command: str, seed: int) -> Tensor:
        rng = random.Random(f"{self.spec.name} {seed} {command}")
        goal, picture = self.domain.goal(command), dict(before[0])
        weakened = before[1] if self.options.fragile and not self.spec.draws else 1.0
        for name, value in goal.items():
            if rng.random() < self.options.success.get(name, 0.0) * weakened:
                picture[name] = value
            elif self.spec.draws:
                picture[name] = rng.choice([v for v in self.domain.values[name] if v != value])
        others = [name for name in self.domain.values if name not in goal]
        if not self.spec.draws and others and rng.random() < self.options.damage:
            name = rng.choice(others)
            picture[name] = rng.choice([v for v in self.domain.values[name] if v != picture[name]])
        return paint(picture, before[1], self.domain)


def paint(goal: Mapping[str, str], quality: float, domain: Domain) -> Tensor:
    """float32 [3, 8, 8] that shows a value of every factor."""
    bands = [2 * (values.index(goal[name]) + 0.5) / len(values) - 1 for name, values in domain.values.items()]
    rows = torch.tensor([level for level in (*bands, 2 * quality - 1) for _ in range(SIDE // (len(bands) + 1))])
    return rows[:, None].expand(3, SIDE, SIDE)


def shown(images: Tensor, domain: Domain) -> list[Goal]:
    """What pictures [B, 3, 8, 8] show."""
    levels = ((images[:, 0, : 2 * len(domain.values) : 2, 0] + 1) / 2).tolist()
    return [
        {name: v[min(int(at * len(v)), len(v) - 1)] for (name, v), at in zip(domain.values.items(), each, strict=True)}
        for each in levels
    ]


def quality(images: Tensor) -> list[float]:
    return ((images[:, 0, -1, 0] + 1) / 2).tolist()


def simulated_experts(*, delayed: bool) -> list[Spec]:
    """Two that draw, fast and slow, and four that edit, two of them good at one factor each, one at both, one at none.

    Without delayed effects the fast one draws subjects a little better, so that a bandit is right to take it. With
    them, editors mostly fail on what it drew.
    """

    def spec(name: str, kind: str, price: float, **options: object) -> Spec:
        return Spec(name=name, kind=f"simulated-{kind}", price=price, options=options)

    edits = {"fragile": delayed}
    return [
        spec("fast", "draw", 0.01, success={"subject": 0.97, "tone": 0.5, "style": 0.5}, quality=0.45),
        spec("slow", "draw", 0.05, success={"subject": 0.93, "tone": 0.6, "style": 0.6}, quality=1.0),
        spec("tone", "edit", 0.02, success={"tone": 0.95, "style": 0.1, "subject": 0.05}, **edits),
        spec("style", "edit", 0.02, success={"tone": 0.1, "style": 0.95, "subject": 0.05}, **edits),
        spec("generalist", "edit", 0.02, success={"tone": 0.6, "style": 0.6, "subject": 0.5}, damage=0.1, **edits),
        spec("careless", "edit", 0.005, success={"tone": 0.3, "style": 0.3, "subject": 0.2}, damage=0.4, **edits),
    ]
