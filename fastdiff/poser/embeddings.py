"""Embeddings of commands: by hashed words, or by the text encoder of a model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Embedding(Protocol):
    size: int  # numbers of an embedding
    name: str  # is written beside a policy, which is refused with another embedding

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """float32 [B, size] of length 1, or 0 for a text without words."""
        ...


def make_embedding(words: int | str, device: str = "auto") -> Embedding:
    """By hashed words, of so many numbers; or by the text encoder of a model that ``fastdiff.load`` reads."""
    return HashedWords(words) if isinstance(words, int) else TextEncoder(words, device)


class HashedWords:
    """Each word adds ±1 at a place that its hash gives (Weinberger et al. 2009): no vocabulary, no file."""

    def __init__(self, size: int = 64) -> None:
        self.size, self.name = size, f"words:{size}"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """float32 [B, size] of length 1, or 0 for a text without words."""
        found = [[0.0] * self.size for _ in texts]
        for row, text in zip(found, texts, strict=True):
            for word in re.findall(r"[\w-]+", text.lower()):
                number = _hash(word)
                row[(number >> 1) % self.size] += 1.0 if number & 1 else -1.0
        return F.normalize(torch.tensor(found).reshape(-1, self.size), dim=1)


class TextEncoder:
    """The mean of the last hidden states of a model's text encoder over a text's tokens.

    source: what ``fastdiff.load`` takes, or a folder of a text model of transformers' (MiniLM, BERT …). The name has
    the SHA-256 of the encoder's weights. A text's bits do not depend on those beside it. Raises what ``fastdiff.load``
    raises, ValueError for a model without one text encoder.
    """

    def __init__(self, source: str, device: str = "auto") -> None:
        import fastdiff
        from fastdiff.checks import named_device
        from fastdiff.pictures.network import weights_sha256

        if os.path.exists(os.path.join(source, "config.json")):  # a pipeline of diffusers' has model_index.json
            from transformers import AutoModel, AutoTokenizer

            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True)
            self.encoder: Any = AutoModel.from_pretrained(source, local_files_only=True).to(named_device(device)).eval()
        else:
            pipe = fastdiff.load(source, device=device, accelerate=False)
            parts = getattr(pipe, "pipe", pipe)  # of another pipeline fastdiff.load gives diffusers' own
            self.encoder, self.tokenizer = getattr(parts, "text_encoder", None), getattr(parts, "tokenizer", None)
        if self.encoder is None or self.tokenizer is None:
            raise ValueError(f"words is {source!r}, a model without a text encoder and its tokenizer")
        self.size = self.encoder.config.hidden_size
        self.name = f"{source}:{weights_sha256(self.encoder)[:16]}"
        self._one = lru_cache(1 << 14)(self._encode)  # commands come again and again

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """float32 [B, size] of length 1, or 0 for a text without words."""
        return torch.stack([self._one(text) for text in texts]) if texts else torch.zeros(0, self.size)

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        if not text.strip():
            return torch.zeros(self.size)
        tokens = self.tokenizer(text, truncation=True, return_tensors="pt").input_ids
        states = self.encoder(tokens.to(self.encoder.device)).last_hidden_state
        return F.normalize(states.float().mean(1), dim=1)[0].cpu()


@lru_cache(1 << 16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
