"""Editing by instruction (Brooks, Holynski & Efros 2023): a UNet that is given a picture and what to change in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.training.text_to_image import Reader, TextRun

FACTORS = ("subject", "style", "tone")
DROPPED = 0.05  # share of examples without the picture, without the instruction, and without both, each (Section 3.2)
# What examples change, and how often. A new tone is learnt soon; what another subject or style keeps is hard to read.
KINDS = {
    ("subject",): 0.3, ("style",): 0.3, ("tone",): 0.1,
    ("subject", "style"): 0.1, ("subject", "tone"): 0.1, ("style", "tone"): 0.1,
}  # fmt: skip
NOISY = 0.5  # share of examples from the noisier half alone, where only the picture tells what is to be kept
PROBED = 0.2  # what the probes' loss counts beside the network's

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
    """Rows that differ in some factors: the cells of a complete table, of which some may be missing.

    values: of each factor. labels: int64 [N, a factor], which of them a row has.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows
        self.values = {name: sorted({row[name] for row in rows}) for name in FACTORS}
        self.labels = torch.tensor([[self.values[name].index(row[name]) for name in FACTORS] for row in rows])
        self.places = {tuple(row[name] for name in FACTORS): i for i, row in enumerate(rows)}

    def draw(self, source: int, generator: torch.Generator) -> tuple[int, str]:
        """A row to change a row into, and a wording of the instruction. Draws again where there is no such row."""
        while True:
            kind = list(KINDS)[int(torch.multinomial(torch.tensor([*KINDS.values()]), 1, generator=generator))]
            changed = [kind[i] for i in torch.randperm(len(kind), generator=generator).tolist()]
            wanted = {name: self.rows[source][name] for name in FACTORS}
            for name in changed:
                others = [value for value in self.values[name] if value != wanted[name]]
                wanted[name] = others[int(torch.randint(len(others), (), generator=generator))]
            target = self.places.get(tuple(wanted[name] for name in FACTORS))
            if target is not None:
                wordings = instructions(self.rows[target], changed)
                return target, wordings[int(torch.randint(len(wordings), (), generator=generator))]


class ProbedReader(Reader):
    """A `Reader`, and linear maps of what its UNet's lowest blocks hold that tell the factors of the edited picture.

    Their loss reaches the layers that read the picture, which that of the noise hardly does where two values look
    alike: deep supervision (Lee et al. 2015). Only the UNet and the text encoder are kept. values: of each factor.
    """

    def __init__(self, unet: Any, text_encoder: nn.Module, values: dict[str, list[str]]) -> None:
        super().__init__(unet, text_encoder)
        width, counts = unet.config.block_out_channels[-1], [len(values[name]) for name in FACTORS]
        self.probes = nn.ModuleList(nn.ModuleList(nn.Linear(width, n) for n in counts) for _ in self.probed())
        for weight in self.probes.parameters():
            nn.init.zeros_(weight)

    def probed(self) -> list[nn.Module]:
        """The blocks that are asked: the last down and the middle one."""
        unet: Any = self.unet
        return [unet.down_blocks[-1], unet.mid_block]

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """What the probed blocks return [B, C, h, w] in the calls of the `with` block."""
        outputs: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [block.register_forward_hook(keep) for block in self.probed()]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def told(self, outputs: list[Tensor], labels: Tensor) -> Tensor:
        """The mean cross-entropy of what the probes tell; labels: int64 [B, a factor], -1 where nothing is asked."""
        losses = []
        for output, probes in zip(outputs, self.probes, strict=True):
            pooled = F.layer_norm(output.float().mean((2, 3)), output.shape[1:2])
            losses += [
                F.cross_entropy(probe(pooled), wanted, ignore_index=-1, reduction="sum")
                for probe, wanted in zip(probes, labels.T, strict=True)  # type: ignore[call-overload]
            ]
        return torch.stack(losses).mean() / max(1, int((labels[:, 0] >= 0).sum()))


class EditRun(TextRun):
    """A `ProbedReader` whose UNet is given the picture's latents, not scaled, beside the edited one's noised ones.

    pairs: of the data's rows. read: tokens [B, L] of instructions.
    """

    def __init__(self, *args: Any, pairs: Pairs, read: Any, **options: Any) -> None:
        self.pairs, self.read = pairs, read
        super().__init__(*args, **options)

    def loss(self) -> Tensor:
        """That of the noise, and what the probes do not tell."""
        model: Any = self.model
        with model.kept() as outputs:
            loss = super().loss()
        return loss + PROBED * model.told(outputs, self.wanted)

    def timesteps(self, count: int) -> Tensor:
        drawn = super().timesteps(count)
        noisy = torch.rand(count, generator=self.generator) < NOISY
        return torch.where(noisy, (len(self.schedule) + drawn) // 2, drawn)

    def examples(self) -> tuple[Tensor, Tensor, Tensor | None]:
        latents, index = next(self.batches)
        data: Any = self.data
        drawn = [self.pairs.draw(source, self.generator) for source in index.tolist()]
        tokens = self.read([wording for _, wording in drawn])
        chance = torch.rand(len(index), generator=self.generator)
        no_words = (chance < DROPPED) | ((chance >= 2 * DROPPED) & (chance < 3 * DROPPED))
        no_picture = (chance >= DROPPED) & (chance < 3 * DROPPED)
        pictures = torch.where(no_picture[:, None, None, None], 0.0, latents / self.scale)
        targets = torch.tensor([target for target, _ in drawn])
        self.wanted = torch.where((no_words | no_picture)[:, None], -1, self.pairs.labels[targets]).to(self.device)
        edited = data.values[targets]
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
