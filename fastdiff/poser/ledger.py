"""What calls cost and what they brought: budgets, the cache, and run.jsonl, which is also where the cache is kept.

A folder holds run.jsonl and images/SHA256.png. A line is written as soon as a reply is there, so that a run that dies
is gone on with by the same command: what was paid for is taken from the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from PIL import Image
from torch import Tensor

from fastdiff.files import atomic_write, check_writable
from fastdiff.poser.chat import ChatDecomposer
from fastdiff.poser.critics import Critic
from fastdiff.poser.experts import Expert
from fastdiff.poser.records import BudgetError, Critique, ExpertError, Picture, Price, Spec, Step, digest
from fastdiff.poser.remote import png
from fastdiff.training.pictures import read_picture

RUN, IMAGES = "run.jsonl", "images"
Told = tuple[Picture, str, str, Picture | None]  # a picture, its command and request, the one before


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one process may spend: cost in the prices' unit, seconds since its start, calls of experts and of critics
    that have a price. A run that is gone on with has a budget of its own.
    """

    cost: Price | None = None
    seconds: Price | None = None
    calls: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Begin(msgspec.Struct, kw_only=True, tag_field="kind", tag="begin"):
    """The first line of a run."""

    request: str
    commands: tuple[str, ...]
    seed: int
    experts: tuple[str, ...]
    version: str


class Paid(msgspec.Struct, kw_only=True, tag_field="kind", tag="paid"):
    """A reply: a picture's hash, a critique or commands; or an error, which may have been billed."""

    key: str
    who: str
    image: str = ""
    critique: Critique | None = None
    commands: tuple[str, ...] = ()
    cost: float = 0.0
    seconds: float = 0.0
    error: str = ""


class End(msgspec.Struct, kw_only=True, tag_field="kind", tag="end"):
    """The last line of a run. ends: "done", "horizon", or what stopped it. satisfied: each command, of the final
    picture; empty where there is none.
    """

    ends: str
    image: str
    done: tuple[str, ...]
    dropped: tuple[str, ...]
    satisfied: tuple[bool, ...]
    cost: float
    calls: int
    seconds: float


Line = Begin | Paid | Step | End


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a run.jsonl; a last one that was cut off in the middle is left out. ValueError names a bad one."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            yield msgspec.json.decode(line, type=Line)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path}, line {number} is none of a run: {error}") from None


def load_picture(folder: Path, sha: str) -> Picture:
    """The picture of a hash. ValueError where the file is missing or another."""
    path = folder / IMAGES / f"{sha}.png"
    try:
        with Image.open(path) as opened:
            image = read_picture(opened, (opened.height, opened.width)).expand(3, -1, -1).float() / 127.5 - 1
    except OSError as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from None
    picture = Picture.batch(image[None])[0]
    if picture.sha != sha:
        raise ValueError(f"{path} is another picture than its name says")
    return picture


@dataclass
class Drawn:
    """A reply to one command. key: of the cache. cost, seconds: 0 where it was cached."""

    picture: Picture
    key: str
    cost: float
    seconds: float
    cached: bool


class Ledger:
    """Makes the calls. folder: where run.jsonl and pictures are kept and looked up; None keeps and looks up nothing."""

    def __init__(self, budget: Budget | None = None, folder: str | os.PathLike[str] | None = None) -> None:
        self.budget, self.folder = budget or Budget(), None if folder is None else Path(folder)
        self.cost, self.calls, self.begun = 0.0, 0, time.monotonic()
        self._paid: dict[str, Paid] = {}
        if self.folder is not None:
            (self.folder / IMAGES).mkdir(parents=True, exist_ok=True)
            path = check_writable(self.folder / RUN)
            if path.exists():
                self._paid = {line.key: line for line in read_lines(path) if isinstance(line, Paid) and not line.error}
                whole = path.read_bytes().rfind(b"\n") + 1
                os.truncate(path, whole)  # a line that was cut off

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def write(self, line: Line) -> None:
        """Append a line and bring it to the disk."""
        if self.folder is not None:
            with open(self.folder / RUN, "ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def afford(self, cost: float, calls: int) -> None:
        """Raises BudgetError where so many calls, of this cost together, are beyond the budget."""
        for name, need in (("cost", self.cost + cost), ("calls", self.calls + calls), ("seconds", self.seconds)):
            limit = getattr(self.budget, name)
            if limit is not None and need > limit + 1e-9:
                raise BudgetError(f"the budget of {name} is {limit:g}, and with the next call it would be {need:.4g}")

    def draw(
        self, expert: Expert, images: Sequence[Picture | None], texts: Sequence[str], seeds: Sequence[int]
    ) -> list[Drawn]:
        """Pictures of one expert, rounded to bytes as a file keeps them; what was drawn before is not drawn again.

        Raises BudgetError before the calls, ExpertError after those that came back were kept.
        """
        spec = expert.spec
        keys = [_key(spec, *each) for each in zip(images, texts, seeds, strict=True)]
        found = {key: self._drawn(self._paid[key]) for key in keys if key in self._paid}
        fresh = [i for i, key in enumerate(keys) if key not in found and keys.index(key) == i]
        if fresh:
            self.afford(spec.price * len(fresh), len(fresh))
            begun, failure, billed = time.monotonic(), None, [True] * len(fresh)
            replies: Sequence[Picture | None]
            try:
                given = None if spec.draws else torch.stack([p.pixels for i in fresh if (p := images[i]) is not None])
                drawn = expert.run(given, [texts[i] for i in fresh], [seeds[i] for i in fresh])
                replies = Picture.batch(_checked(spec, drawn, len(fresh)))
            except ExpertError as error:
                failure = error
                replies = [i if i is None else Picture.batch(i[None])[0] for i in error.images or [None] * len(fresh)]
                billed = error.billed if len(error.billed) == len(fresh) else [any(error.billed)] * len(fresh)
            seconds = (time.monotonic() - begun) / len(fresh)
            for i, reply, owed in zip(fresh, replies, billed, strict=True):
                paid = Paid(key=keys[i], who=spec.name, cost=spec.price * owed, seconds=seconds)
                if reply is None:
                    paid.error = str(failure)
                else:
                    paid.image = self.keep(reply)
                    found[keys[i]] = Drawn(reply, keys[i], paid.cost, seconds, False)
                self._record(paid)
            if failure is not None:
                raise failure
        return [found[key] for key in keys]

    def keep(self, picture: Picture) -> str:
        """Write a picture under its hash, which is returned."""
        if self.folder is not None and not (path := self.folder / IMAGES / f"{picture.sha}.png").exists():
            with atomic_write(path) as file:
                file.write(png(picture.pixels))
        return picture.sha

    def _drawn(self, paid: Paid) -> Drawn:
        assert self.folder is not None  # only with one is anything looked up
        return Drawn(load_picture(self.folder, paid.image), paid.key, 0.0, 0.0, True)

    def _record(self, paid: Paid, calls: int = 1) -> None:
        self.cost, self.calls = self.cost + paid.cost, self.calls + calls
        self.write(paid)
        if self.folder is not None and not paid.error:
            self._paid[paid.key] = paid

    def split(self, decomposer: ChatDecomposer, name: str, request: str) -> tuple[str, ...]:
        """The commands of a request. name: by which the decomposer is told from others.

        Raises BudgetError before the call, ExpertError where it failed.
        """
        key, begun = digest("decomposer", name, request), time.monotonic()
        if key in self._paid:
            return self._paid[key].commands
        calls = int(decomposer.price > 0)
        self.afford(decomposer.price, calls)
        try:
            commands = decomposer.split(request)
        except ExpertError as error:
            owed = decomposer.price if any(error.billed) else 0.0
            self._record(Paid(key=key, who="decomposer", cost=owed, error=str(error)), calls)
            raise
        seconds, cost = time.monotonic() - begun, decomposer.price
        self._record(Paid(key=key, who="decomposer", commands=commands, cost=cost, seconds=seconds), calls)
        return commands

    def rate(self, critic: Critic, name: str, told: Sequence[Told]) -> list[tuple[Critique, str, float]]:
        """A critique each, its key and what was paid for it. name: by which the critic is told from others. One that
        has a price is asked for one at a time, so that what came back before a failure is kept.
        """
        keys = [digest("critic", name, i.sha, command, request, p.sha if p else "") for i, command, request, p in told]
        known = ((i, self._paid.get(key)) for i, key in enumerate(keys))
        found = {i: (paid.critique, 0.0) for i, paid in known if paid and paid.critique}
        fresh, calls = [i for i in range(len(keys)) if i not in found], int(critic.price > 0)
        for part in [[i] for i in fresh] if calls else [fresh] if fresh else []:
            self.afford(critic.price * len(part), calls * len(part))
            begun, parts = time.monotonic(), list(zip(*(told[i] for i in part), strict=True))
            try:
                pixels, before = torch.stack([p.pixels for p in parts[0]]), [p.pixels if p else None for p in parts[3]]
                critiques = critic.rate(pixels, parts[1], parts[2], before)
            except ExpertError as error:
                owed = critic.price if any(error.billed) else 0.0
                self._record(Paid(key=keys[part[0]], who="critic", cost=owed, error=str(error)), calls)
                raise
            each = (time.monotonic() - begun) / len(part)
            for i, critique in zip(part, critiques, strict=True):
                found[i] = critique, critic.price
                paid = Paid(key=keys[i], who="critic", critique=critique, cost=critic.price, seconds=each)
                self._record(paid, calls)
        return [(found[i][0], keys[i], found[i][1]) for i in range(len(keys))]


def _key(spec: Spec, image: Picture | None, text: str, seed: int) -> str:
    source = spec.source, spec.dtype, spec.url, spec.model
    what: list[Any] = [spec.name, spec.kind, *source, spec.box, spec.size, spec.options]
    return digest(*what, text, "" if spec.draws or image is None else image.sha, seed)


def _checked(spec: Spec, images: Tensor, number: int) -> Tensor:
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[:2] != (number, 3):
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ExpertError(f"{spec.name} must give pictures [{number}, 3, H, W]; got {got}", billed=[True] * number)
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        raise ExpertError(
            f"{spec.name} gave pictures that are no finite floating-point numbers", billed=[True] * number
        )
    return images
