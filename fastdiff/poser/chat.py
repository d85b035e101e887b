"""Language models that rate pictures and take requests apart: behind HTTP, or on this machine.

What they answer is checked against the schema here, too, since older servers ignore response_format.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from PIL import Image
from torch import Tensor

from fastdiff.pictures.grid import to_uint8
from fastdiff.poser.critics import Previous
from fastdiff.poser.records import Critique, ExpertError
from fastdiff.poser.remote import Endpoint, png

T = TypeVar("T", bound=msgspec.Struct)
LONGEST = 512  # tokens of a local model's answer

_RATE = (
    "You rate a picture by one command of a request. satisfied: the command is carried out, and nothing that the "
    "request asks for and that was right in the picture before has been lost. score: from 0 to 1. issues: what is "
    "wrong, a sentence each. suggestion: a command that would mend it, or an empty text. Answer with JSON of this "
    "schema: "
)
_SPLIT = (
    "Take a request for a picture apart into commands that are carried out one after another. The first draws, each "
    "other changes one thing. Keep the request's own words, and what is in quotation marks as it stands. Answer with "
    "JSON of this schema: "
)


class Commands(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request is taken apart into."""

    commands: Annotated[
        tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=1000, pattern=r"\w")], ...],
        msgspec.Meta(min_length=1, max_length=20),
    ]


def parse(who: str, content: str, kind: type[T]) -> T:
    """The JSON object in an answer, whatever stands around: code fences, greetings. ExpertError for another."""
    try:
        return msgspec.json.decode(content[content.find("{") : content.rfind("}") + 1], type=kind)
    except (msgspec.DecodeError, UnicodeError) as error:
        told = f"{who}: its answer is no {kind.__name__} ({error}): {content[:200]!r}"
    raise ExpertError(told, billed=[True])


def _schema(kind: type[msgspec.Struct]) -> str:
    return msgspec.json.encode(msgspec.json.schema(kind)).decode()


class Chat:
    """A model behind an OpenAI-compatible chat endpoint. url, model, key, timeout: as of a remote expert."""

    def __init__(self, who: str, url: str, model: str, key: str, timeout: float) -> None:
        self.who, self.model, self.endpoint = who, model, Endpoint(who, url, key, timeout)

    def ask(self, system: str, content: Any, kind: type[T]) -> T:
        """The answer of a kind to a message. ExpertError where the call fails or the answer is none of the kind."""
        form = {"name": kind.__name__, "schema": msgspec.json.schema(kind)}
        asked = {
            "model": self.model,
            "messages": [{"role": "system", "content": system + _schema(kind)}, {"role": "user", "content": content}],
            "response_format": {"type": "json_schema", "json_schema": form},
        }
        reply = self.endpoint.post("/chat/completions", json=asked)
        try:
            answer = str(reply["choices"][0]["message"]["content"])
        except (LookupError, TypeError):
            raise ExpertError(f"{self.who}: its reply has no choices[0].message.content", billed=[True]) from None
        return parse(self.who, answer, kind)


class ChatCritic:
    """A vision-language model behind an OpenAI-compatible chat endpoint. price: of a rating."""

    def __init__(self, url: str, model: str, key: str = "", timeout: float = 120.0, price: float = 0.0) -> None:
        self.chat, self.price = Chat("the critic", url, model, key, timeout), price

    def rate(
        self, images: Tensor, commands: Sequence[str], requests: Sequence[str], previous: Previous
    ) -> list[Critique]:
        return [self._of(*each) for each in zip(images, commands, requests, previous, strict=True)]

    def _of(self, image: Tensor, command: str, request: str, before: Tensor | None) -> Critique:
        urls = [
            f"data:image/png;base64,{base64.b64encode(png(each)).decode()}"
            for each in (before, image) if each is not None
        ]  # fmt: skip
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        text = {"type": "text", "text": _question(command, request, before)}
        return self.chat.ask(_RATE, [text, *pictures], Critique)


class VisionCritic:
    """A vision-language model of transformers', of a folder on this machine, with its processor and chat template.

    Raises ImportError where transformers is missing, ValueError for a folder without such a model.
    """

    price = 0.0

    def __init__(self, source: str, device: str = "auto") -> None:
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise ImportError('a local critic needs transformers: pip install "fastdiff-torch[text]"') from error
        from fastdiff.checks import named_device

        try:
            self.processor: Any = AutoProcessor.from_pretrained(source, local_files_only=True)
            kind: Any = AutoModelForImageTextToText
            self.model = kind.from_pretrained(source, local_files_only=True, dtype="auto")
        except (OSError, ValueError) as error:
            raise ValueError(f"source of the critic: {source} holds no vision-language model: {error}") from None
        self.model.to(named_device(device)).eval()

    def rate(
        self, images: Tensor, commands: Sequence[str], requests: Sequence[str], previous: Previous
    ) -> list[Critique]:
        return [self._of(*each) for each in zip(images, commands, requests, previous, strict=True)]

    def _of(self, image: Tensor, command: str, request: str, before: Tensor | None) -> Critique:
        shown = [
            Image.fromarray(to_uint8(each).permute(1, 2, 0).cpu().numpy())
            for each in (before, image) if each is not None
        ]  # fmt: skip
        text = {"type": "text", "text": f"{_RATE}{_schema(Critique)}\n{_question(command, request, before)}"}
        told = [{"role": "user", "content": [*({"type": "image"} for _ in shown), text]}]
        words = self.processor.apply_chat_template(told, add_generation_prompt=True)
        return parse("the critic", self._answer(words, shown), Critique)

    @torch.no_grad()
    def _answer(self, words: str, images: Sequence[Image.Image]) -> str:
        given = self.processor(images=list(images), text=words, return_tensors="pt").to(self.model.device)
        given = {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in given.items()}
        tokens = self.model.generate(**given, max_new_tokens=LONGEST, do_sample=False)
        return str(self.processor.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


class ChatDecomposer:
    """A language model behind an OpenAI-compatible chat endpoint that takes requests apart. price: of a request."""

    def __init__(self, url: str, model: str, key: str = "", timeout: float = 120.0, price: float = 0.0) -> None:
        self.chat, self.price = Chat("the decomposer", url, model, key, timeout), price

    def split(self, request: str) -> tuple[str, ...]:
        """The commands of a request, in order. ExpertError where the call fails or its answer is none."""
        return self.chat.ask(_SPLIT, request, Commands).commands


def _question(command: str, request: str, before: Tensor | None) -> str:
    shown = "the picture" if before is None else "the picture before, then the picture to rate"
    return f"Request: {request}\nCommand: {command}\nYou see {shown}."
