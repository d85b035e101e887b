"""experts.toml: the experts, the critic, the rules and the budget, by name."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from fastdiff.checks import check_choice
from fastdiff.poser.chat import ChatCritic, ChatDecomposer, VisionCritic
from fastdiff.poser.critics import Critic, NoisyCritic, emoji_critic, simulated_critic
from fastdiff.poser.domain import Domain
from fastdiff.poser.ledger import Budget
from fastdiff.poser.records import KINDS, REMOTE, Price, Rules, Seconds, Spec
from fastdiff.poser.remote import check_url
from fastdiff.poser.simulated import simulated_experts
from fastdiff.poser.text_critic import TextCritic

EMOJI = Path(__file__).with_name("emoji.toml")


class CriticSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """kind: "simulated"; "emoji", the exact judge; "chat", an OpenAI-compatible endpoint (url, model, key, timeout,
    price); "vision", a vision-language model of transformers' in the folder source. text: what a command has in
    quotation marks is read in the picture, by rapidocr, and the critic of the kind rates all else. flip: the chance
    that a verdict is turned into its opposite, for studies, by flip_seed.
    """

    kind: Literal["simulated", "emoji", "chat", "vision"]
    source: str = ""
    text: bool = False
    flip: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    flip_seed: int = 0
    url: str = ""
    model: str = ""
    key: str = ""
    timeout: Seconds = 120.0
    price: Price = 0.0


class DecomposerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What takes a request apart. kind: "rules", the domain's grammar; "chat", an OpenAI-compatible endpoint (url,
    model, key, timeout, price).
    """

    kind: Literal["rules", "chat"] = "rules"
    url: str = ""
    model: str = ""
    key: str = ""
    timeout: Seconds = 120.0
    price: Price = 0.0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An experts.toml. words: numbers by which a command is embedded, of hashed words; or what ``fastdiff.load``
    takes, whose text encoder then embeds. hand: a hand-written rule, the expert of each kind of command ("subject",
    "tone", "style", "text"), or several, of which the first that is there is taken.
    """

    expert: list[Spec]
    critic: CriticSpec
    decomposer: DecomposerSpec = DecomposerSpec()
    words: Annotated[int, msgspec.Meta(ge=1, le=4096)] | Annotated[str, msgspec.Meta(min_length=1)] = 64
    rules: Rules = Rules()
    budget: Budget = Budget()
    hand: dict[str, str | list[str]] = {}

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.expert]
        for spec in self.expert:
            check_choice(f"kind of {spec.name}", spec.kind, KINDS)
            if spec.kind in REMOTE:
                check_url(f"url of {spec.name}", spec.url)
        for kind, told in self.hand.items():
            check_choice("a kind of command in hand", kind, ("subject", "tone", "style", "text"))
            for name in [told] if isinstance(told, str) else told:
                check_choice(f"hand.{kind}", name, names)

    @classmethod
    def read(cls, source: str | os.PathLike[str] | None) -> Config:
        """Of a file, or of a name: "simulated" (and None), "simulated-delayed", or "emoji", the packaged model.

        Raises FileNotFoundError, or ValueError that says where the file is not what it must be.
        """
        name = "simulated" if source is None else os.fspath(source)
        if name in ("simulated", "simulated-delayed"):
            experts = simulated_experts(delayed=name == "simulated-delayed")
            hand: dict[str, str | list[str]] = {"subject": "slow", "tone": "tone", "style": "style"}
            return cls(expert=experts, critic=CriticSpec(kind="simulated"), hand=hand)
        path = EMOJI if name == "emoji" else Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; names are simulated, simulated-delayed and emoji")
        try:
            return msgspec.toml.decode(path.read_bytes(), type=cls)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def domain(self) -> Domain:
        """The emoji's own where they judge, a dozen subjects elsewhere."""
        if self.critic.kind != "emoji":
            return Domain()
        return Domain.of_rows(row for row in _emoji().rows if row["subset"] == "emoji-240")


def make_critic(spec: CriticSpec, domain: Domain, device: str = "auto") -> Critic:
    critic = _critic(spec, domain, device)
    critic = TextCritic(critic, domain) if spec.text else critic
    return NoisyCritic(critic, spec.flip, spec.flip_seed) if spec.flip else critic


def second_critic(spec: CriticSpec, domain: Domain) -> Critic | None:
    """Another judge than the one that rewards: of the emoji the one of EfficientNet's features; None of others.

    Raises ImportError with the command that helps where the extra "evaluate" is missing.
    """
    if spec.kind != "emoji":
        return None
    from fastdiff.evaluation import ImageNetFeatures, Judge

    return emoji_critic(Judge(_emoji().rows, _emoji().pixels, ImageNetFeatures().patches), _emoji().rows, domain)


def make_decomposer(spec: DecomposerSpec) -> ChatDecomposer | None:
    """None for the rules, which are the domain's."""
    if spec.kind == "rules":
        return None
    return ChatDecomposer(spec.url, spec.model, spec.key, spec.timeout, spec.price)


def _critic(spec: CriticSpec, domain: Domain, device: str) -> Critic:
    if spec.kind == "simulated":
        return simulated_critic(domain)
    if spec.kind == "emoji":
        from fastdiff.evaluation import Judge

        return emoji_critic(Judge(_emoji().rows, _emoji().pixels), _emoji().rows, domain)
    if spec.kind == "vision":
        return VisionCritic(spec.source, device)
    return ChatCritic(spec.url, spec.model, spec.key, spec.timeout, spec.price)


@cache
def _emoji() -> Any:
    from fastdiff.training.captioned import load_captioned

    return load_captioned("emoji", part=None, subset=None)
