"""Prompts: what they may be, what of them a tokenizer leaves out, and their embeddings."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

# A fast tokenizer keeps how it pads and truncates, which every call sets anew: two threads would meet there.
_TOKENIZING = threading.RLock()


def check_prompts(name: str, prompts: Any) -> list[str]:
    """A prompt, or several, as a list. Raises TypeError for what is no str, ValueError where there is none."""
    several = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(several, Sequence):
        raise TypeError(f"{name} must be a str, or several; got {type(prompts).__name__}")
    for i, text in enumerate(several):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] must be a str; got {type(text).__name__}")
    if not several:
        raise ValueError(f"{name} must hold at least one str")
    return list(several)


def warn_of_losses(pipe: Any, texts: Sequence[str]) -> None:
    """Warn of what does not reach the network: the end of a prompt beyond the window, words without a token."""
    tokenizers = filter(None, (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)))
    with _TOKENIZING:
        lost = dict.fromkeys(note for tokenizer in tokenizers for text in texts for note in _losses(tokenizer, text))
    for note in lost:
        warnings.warn(note, stacklevel=4)  # where the pipeline was called


def _losses(tokenizer: Any, text: str) -> list[str]:
    notes = []
    encoded = tokenizer(text, verbose=False, return_offsets_mapping=bool(tokenizer.is_fast))
    ids, window = encoded.input_ids, tokenizer.model_max_length
    if len(ids) > window:
        cut = tokenizer.decode(ids[window - 1 : -1]).strip()  # one of the window, and the last, are the end's
        notes.append(f"the prompt has {len(ids)} tokens and the text encoder reads {window}; what is cut: {cut!r}")
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.eos_token_id, tokenizer.pad_token_id) or not tokenizer.is_fast:
        return notes  # a vocabulary of bytes spells any word
    spans = zip(ids, encoded.offset_mapping, strict=True)
    words = dict.fromkeys(text[begin:end] for token, (begin, end) in spans if token == unknown)
    for word in words:
        near = get_close_matches(word, tokenizer.get_vocab(), n=1)
        notes.append(f"the model does not know the word {word!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return notes


def vocabulary(tokenizer: Any) -> str:
    """All that a tokenizer's ids depend on, as text; of a slow one its tokens."""
    if not tokenizer.is_fast:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    # Every call sets these two anew.
    return json.dumps({name: value for name, value in told.items() if name not in ("truncation", "padding")})


def encode(pipe: Any, texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Each distinct text's embedding [1, tokens, width] and, of SDXL, pooled embedding [1, width].

    One by one, so that a prompt's numbers do not depend on the others beside it.
    """
    from diffusers import StableDiffusionPipeline

    # InstructPix2Pix's own method has another signature and stacks its result.
    function = getattr(type(pipe), "encode_prompt", StableDiffusionPipeline.encode_prompt)
    how = {"device": pipe.unet.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = {}
    for text in dict.fromkeys(texts):
        with _TOKENIZING:
            embeddings = function(pipe, text, **how)
        found[text] = embeddings[0], embeddings[2] if len(embeddings) > 2 else None
    return found


def keywords(pipe: Any, texts: Sequence[str | None], size: tuple[int, int], *, unconditional: bool) -> dict[str, Any]:
    """The UNet's keywords of an image a prompt: of SDXL with its pooled embeddings and sizes.

    A None is no prompt: zeros where the checkpoint was trained so (SDXL base), or else the empty prompt.
    """
    zeros = bool(pipe.config.get("force_zeros_for_empty_prompt", False))
    embeddings = encode(pipe, [text or "" for text in texts])

    def stacked(part: int) -> Tensor:
        entries = [(text, embeddings[text or ""][part]) for text in texts]
        each = [torch.zeros_like(e) if text is None and zeros else e for text, e in entries]
        return torch.cat(each).to(pipe.unet.dtype)  # which may have been moved to another by itself

    told: dict[str, Any] = {"encoder_hidden_states": stacked(0)}
    if pipe.unet.config.addition_embed_type != "text_time":
        return told
    if pipe.config.get("requires_aesthetics_score"):
        ids = [*size, 0, 0, 2.5 if unconditional else 6.0]  # diffusers' defaults
    else:
        ids = [*size, 0, 0, *size]
    pooled = stacked(1)
    time_ids = torch.tensor([ids], dtype=pooled.dtype, device=pooled.device).repeat(len(pooled), 1)
    return {**told, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
