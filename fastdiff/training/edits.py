"""Editing by instruction (Brooks, Holynski & Efros 2023): a UNet that is given a picture and what to change in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.training.text_to_image import TextRun

FACTORS = ("subject", "style", "tone")
DROPPED = 0.05  # share of examples without the picture, without the instruction, and without both, each (Section 3.2)
TWO = 0.25  # share of examples that change two factors

_ASKED = {
    "tone": ("make the skin {}", "{} skin", "change the skin tone to {}", "give them {} skin"),
    "style": ("in {} style", "make it {} style", "draw it in {} style", "change the style to {}"),
    "subject": ("a {} instead", "make it a {}", "turn it into a {}", "change it to a {}"),
}


def instructions(row: dict[str, Any], changed: Sequence[str]) -> list[str]:
    """Ways to ask for a row's value of one factor; of two, one after the other. A picture without a tone is yellow."""
    asked = [[wording.format(row[name] or "yellow") for wording in _ASKED[name]] for name in changed]
    if len(asked) == 1:
        return asked[0]
    return [f"{one} and {other}" for one in asked[0] for other in asked[1]]


class Pairs:
    """Rows that differ in some factors: the cells of a complete table, of which some may be missing."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows
        self.values = {name: sorted({row[name] for row in rows}) for name in FACTORS}
        self.places = {tuple(row[name] for name in FACTORS): i for i, row in enumerate(rows)}

    def draw(self, source: int, generator: torch.Generator) -> tuple[int, str]:
        """A row to change a row into, and a wording of the instruction. Draws again where there is no such row."""
        while True:
            # Three factors for one: their order says which one or two are changed.
            order = torch.randperm(len(FACTORS), generator=generator).tolist()
            two = torch.rand((), generator=generator).item() < TWO
            changed = [FACTORS[i] for i in order[: 2 if two else 1]]
            wanted = {name: self.rows[source][name] for name in FACTORS}
            for name in changed:
                others = [value for value in self.values[name] if value != wanted[name]]
                wanted[name] = others[int(torch.randint(len(others), (), generator=generator))]
            target = self.places.get(tuple(wanted[name] for name in FACTORS))
            if target is not None:
                wordings = instructions(self.rows[target], changed)
                return target, wordings[int(torch.randint(len(wordings), (), generator=generator))]


class EditRun(TextRun):
    """A `Reader` whose UNet is given the picture's latents, not scaled, beside the noised ones of the edited picture.

    pairs: of the data's rows. read: tokens [B, L] of instructions.
    """

    def __init__(self, *args: Any, pairs: Pairs, read: Any, **options: Any) -> None:
        self.pairs, self.read = pairs, read
        super().__init__(*args, **options)

    def examples(self) -> tuple[Tensor, Tensor, Tensor | None]:
        latents, index = next(self.batches)
        data: Any = self.data
        drawn = [self.pairs.draw(source, self.generator) for source in index.tolist()]
        tokens = self.read([wording for _, wording in drawn])
        chance = torch.rand(len(index), generator=self.generator)
        no_words = (chance < DROPPED) | ((chance >= 2 * DROPPED) & (chance < 3 * DROPPED))
        no_picture = (chance >= DROPPED) & (chance < 3 * DROPPED)
        pictures = torch.where(no_picture[:, None, None, None], 0.0, latents / self.scale)
        edited = data.values[torch.tensor([target for target, _ in drawn])]
        tokens = torch.where(no_words[:, None], self.empty, tokens)
        return edited.to(self.device), tokens.to(self.device), pictures.to(self.device)

    def write_samples(self, out: Any) -> None:
        """None: the command's scores show what an editor does."""


def widened(unet: Any, channels: int) -> Any:
    """A copy of a UNet that takes more channels, of which the new ones count for nothing yet."""
    from diffusers import UNet2DConditionModel

    config = dict(unet.config) | {"in_channels": channels}
    wide = UNet2DConditionModel.from_config(config)
    weights = unet.state_dict()
    grown = torch.zeros_like(wide.conv_in.weight)
    grown[:, : unet.config.in_channels] = weights["conv_in.weight"]
    wide.load_state_dict(weights | {"conv_in.weight": grown})
    return wide


def with_words(tokenizer: Any, text_encoder: Any, texts: Sequence[str]) -> tuple[Any, Any]:
    """A tokenizer and a text encoder that know the words of more texts; the new ones' vectors are drawn by torch."""
    from tokenizers import Tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    found = {
        word
        for text in texts
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    }
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    for word in sorted(found - set(vocabulary)):
        vocabulary[word] = len(vocabulary)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip
    grown = CLIPTextModel(CLIPTextConfig.from_dict(text_encoder.config.to_dict() | {"vocab_size": len(tokenizer)}))
    own = grown.state_dict()
    for name, value in text_encoder.state_dict().items():
        own[name][: len(value)] = value  # all of it, but for the embedding of words, which has grown
    return tokenizer, grown
