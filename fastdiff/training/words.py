"""Words and the network that reads them: a tokenizer of whole words and a CLIP text model, both transformers' own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BEGIN, END, UNKNOWN, PAD = "<begin>", "<end>", "<unknown>", "<pad>"


def new_tokenizer(captions: Iterable[str], *, length: int, vocabulary: int) -> Any:
    """A PreTrainedTokenizerFast of the most frequent words of the captions, in small letters and without punctuation.

    length: tokens of a caption at most, its beginning and end among them. vocabulary: words at most.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    # Punctuation inside of a word, as in medium-dark, belongs to it.
    outside = normalizers.Replace(Regex(r"(?<![\w])[^\w\s<>]+|[^\w\s<>]+(?![\w])"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), outside])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [PAD, BEGIN, END, UNKNOWN]
    tokenizer.train_from_iterator(captions, trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=special))
    ends = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN, pad_token=PAD,
        model_max_length=length, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def new_text_encoder(tokenizer: Any, *, width: int, layers: int) -> Any:
    """A CLIPTextModel of random weights for a tokenizer of `new_tokenizer`; heads of 32 channels."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
            num_hidden_layers=layers, num_attention_heads=width // 32, hidden_act="gelu",
            max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def tokens_of(tokenizer: Any, captions: list[str]) -> Any:
    """int64 [N, length], as diffusers' pipelines make them: padded, and cut where they are too long."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
