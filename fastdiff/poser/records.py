"""What the parts hand to each other, and what is written to files: each is checked by msgspec where it comes in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from torch import Tensor

from fastdiff.pictures.grid import to_uint8

DRAW = ("draw", "diffusers", "generations")  # kinds that need no picture
EDIT = ("edit", "image-to-image", "inpaint", "diffusers-edit", "edits")
KINDS = (*DRAW, *EDIT, "simulated-draw", "simulated-edit")
REMOTE = ("generations", "edits")

Price = Annotated[float, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class ExpertError(RuntimeError):
    """A call failed. images: what came back all the same, one a command, None where nothing did. billed: whether each
    may have to be paid for.
    """

    def __init__(self, message: str, images: list[Tensor | None] | None = None, billed: list[bool] | None = None):
        super().__init__(message)
        self.images, self.billed = images or [], billed or []


class BudgetError(RuntimeError):
    """The next call would exceed the budget; it was not made."""


class Critique(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A critic's word on one picture and one command.

    score: from 0 to 1. satisfied: whether the command is carried out. issues: what is wrong, a sentence each, which of
    the domain's critics begins with the factor ("tone: …"). suggestion: a command that would mend it.
    """

    score: Annotated[float, msgspec.Meta(ge=0, le=1)]
    satisfied: bool
    issues: tuple[str, ...] = ()
    suggestion: str = ""


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An expert as experts.toml names it.

    kind: one of ``KINDS``. source: of local ones, what ``fastdiff.load`` takes, or diffusers' folder; dtype: of its
    weights, as there. optional: where the source is missing the expert is left out, with a warning. url, model, key,
    timeout (seconds), concurrency: of remote ones; key is the NAME of the environment variable that holds the secret.
    price: of a call. given: whether it is told the command alone, or one merged with those before. box: of
    "inpaint", the (top, left, bottom, right) that is drawn anew, as shares of the sides. size: pixels a side of what
    comes back. seeded: also send the seed to a remote one; OpenAI refuses that. options: anything else that the call
    takes.
    """

    name: Annotated[str, msgspec.Meta(min_length=1)]
    kind: str
    source: str = ""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    optional: bool = False
    url: str = ""
    model: str = ""
    key: str = ""
    price: Price = 0.0
    timeout: Seconds = 120.0
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    given: Literal["command", "merged"] = "command"
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    size: Annotated[int, msgspec.Meta(ge=1, le=8192)] = 64
    seeded: bool = False
    options: dict[str, Any] = {}

    @property
    def draws(self) -> bool:
        """Whether it works without a picture."""
        return self.kind in DRAW or self.kind == "simulated-draw"


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The decision process. horizon: steps at most. attempts: failures after which a command is dropped. step_cost: of
    each step, off the reward. keep_best: a failed step that scores lower leaves the picture as it was. reflection:
    a failed command is worded anew from the critique. extended: observe attempts, the last score and whether there is
    a picture, too.
    """

    horizon: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 6
    attempts: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    step_cost: Price = 0.05
    keep_best: bool = False
    reflection: bool = True
    extended: bool = False


class Step(msgspec.Struct, kw_only=True, tag_field="kind", tag="step"):
    """A line of run.jsonl, and all that happened in one step.

    number: of the step in its episode, from 0. remaining: commands after this one. text: what the expert was told.
    before, after: SHA-256 of the pictures, "" for none. attempts, score: before the step. outcome: "done", "failed",
    "dropped". ends: "" or "done", "horizon". key, critic_key: of the cache. cost: what was paid for it.
    """

    request: str
    seed: int
    number: int
    command: str
    remaining: tuple[str, ...]
    text: str
    expert: str
    options: dict[str, Any]
    before: str
    after: str
    attempts: int
    score: float
    critique: Critique
    outcome: str
    ends: str
    reward: float
    cost: float
    seconds: float
    cached: bool
    key: str
    critic_key: str
    q: tuple[float, ...] = ()


def digest(*parts: Any) -> str:
    """SHA-256 of parts that msgspec writes as JSON, with sorted keys."""
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


@dataclass(frozen=True, eq=False)
class Picture:
    """pixels: float32 [3, H, W] in [-1, 1], rounded to what bytes hold. sha: SHA-256 of its size and bytes."""

    pixels: Tensor
    sha: str

    @classmethod
    def batch(cls, images: Tensor) -> list[Picture]:
        """Of images [B, 3, H, W], on any device."""
        pixels = to_uint8(images).cpu()
        size = str(list(pixels.shape[1:])).encode()
        shas = [hashlib.sha256(size + each.tobytes()).hexdigest() for each in pixels.numpy()]
        return [cls(*pair) for pair in zip(pixels.float() / 127.5 - 1, shas, strict=True)]
