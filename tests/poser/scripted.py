"""Experts and critics that follow a script, the poser of them, and replies of a server."""

import base64
import io
import json

import torch
from PIL import Image

from fastdiff.poser.domain import Domain
from fastdiff.poser.embeddings import HashedWords
from fastdiff.poser.ledger import Ledger
from fastdiff.poser.poser import Poser
from fastdiff.poser.records import Critique, Rules, Spec


class Scripted:
    """Draws pictures of a running number; keeps its calls. raises: what its n-th call raises."""

    def __init__(self, name="a", kind="draw", price=0.0, raises=None, **more):
        self.spec, self.calls, self.raises = Spec(name=name, kind=kind, price=price, **more), [], raises or {}

    def run(self, images, commands, seeds):
        self.calls.append((None if images is None else images.clone(), list(commands), list(seeds)))
        if len(self.calls) in self.raises:
            raise self.raises[len(self.calls)]
        return torch.stack(
            [torch.full((3, 4, 4), (hash_of(c) + s) % 251 / 125 - 1) for c, s in zip(commands, seeds, strict=True)]
        )


def hash_of(text):
    return sum(map(ord, text))


class ScriptedCritic:
    """Gives the scores of a script, one after another; satisfied from 0.9 on."""

    def __init__(self, *scores, price=0.0):
        self.scores, self.price, self.asked = list(scores), price, []

    def rate(self, images, commands, requests, previous):
        self.asked += list(zip(images, commands, requests, previous, strict=True))
        return [Critique(s, s >= 0.9, () if s >= 0.9 else ("tone: it is light, not dark",), "make the skin dark")
                for s in (self.scores.pop(0) if self.scores else 1.0 for _ in commands)]  # fmt: skip


def poser(experts=None, critic=None, folder=None, budget=None, **rules):
    domain = Domain()
    experts = experts or [Scripted("a"), Scripted("b", "edit", price=0.5)]
    return Poser(experts, critic or ScriptedCritic(), domain, HashedWords(16), rules=Rules(**rules),
                 ledger=Ledger(budget, folder))  # fmt: skip


def image_reply(colour: tuple[int, int, int] = (255, 0, 0), side: int = 8) -> tuple[int, dict]:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, format="PNG")
    return 200, {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}


def chat_reply(content: object) -> tuple[int, dict]:
    text = content if isinstance(content, str) else json.dumps(content)
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}
