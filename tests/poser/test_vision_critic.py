"""A vision-language model of a folder: what it is given, and that only a critique is taken for one."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from fastdiff.poser.chat import VisionCritic
from fastdiff.poser.config import CriticSpec, make_critic
from fastdiff.poser.domain import Domain
from fastdiff.poser.records import Critique, ExpertError

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
from random_pipeline import word_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
GOOD = {"score": 0.8, "satisfied": False, "issues": ["tone: light"], "suggestion": "make the skin dark"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA of random weights, whose answers are words without a brace."""
    import transformers as tf

    torch.manual_seed(0)
    tokenizer = word_tokenizer(4096)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = tf.CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 image_size=16, patch_size=8)  # fmt: skip
    words = tf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096,
                           bos_token_id=2, eos_token_id=3, pad_token_id=0)  # fmt: skip
    config = tf.LlavaConfig(vision_config=vision, text_config=words, image_token_index=image_token)
    size = {"height": 16, "width": 16}
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size=size, crop_size=size), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", image_token="<image>", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("llava")
    tf.LlavaForConditionalGeneration(config).save_pretrained(place)
    processor.save_pretrained(place)
    return str(place)


def rate(critic, before=None):
    return critic.rate(torch.zeros(1, 3, 16, 16), ["dark skin"], ["draw a pilot, then dark skin"], [before])[0]


@pytest.mark.slow
def test_words_at_random_are_no_critique(folder, monkeypatch):
    monkeypatch.setattr("fastdiff.poser.chat.LONGEST", 8)
    critic = make_critic(CriticSpec(kind="vision", source=folder), Domain(), "cpu")
    with pytest.raises(ExpertError, match="the critic: its answer is no Critique"):
        rate(critic, torch.ones(3, 16, 16))


@pytest.mark.slow
def test_what_it_is_asked_and_what_it_answers(folder, monkeypatch):
    """Its own generate is replaced; template, processor and decoding are the library's."""
    critic, given = VisionCritic(folder, "cpu"), {}
    answer = "Sure! " + json.dumps(GOOD)
    monkeypatch.setattr(critic.processor, "decode", lambda tokens, **how: answer if tokens.tolist() == [5, 6] else "?")

    def generate(**inputs):
        given.update(inputs)
        return torch.cat([inputs["input_ids"], torch.tensor([[5, 6]])], 1)

    monkeypatch.setattr(critic.model, "generate", generate)
    assert rate(critic, torch.ones(3, 16, 16)) == Critique(0.8, False, ("tone: light",), "make the skin dark")
    assert given["pixel_values"].shape == (2, 3, 16, 16)  # the one before, and the one to rate
    assert given["pixel_values"][0].mean() > given["pixel_values"][1].mean()
    words = critic.processor.tokenizer.decode(given["input_ids"][0])
    assert "dark skin" in words
    assert given["do_sample"] is False
    rate(critic)
    assert given["pixel_values"].shape == (1, 3, 16, 16)


def test_a_folder_without_such_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"source of the critic: .* holds no vision-language model"):
        VisionCritic(str(tmp_path / "none"), "cpu")
