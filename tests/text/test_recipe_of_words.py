"""A picture of words carries its prompts and the pipeline's identity, and is made again of them, to the bit."""

import json

import msgspec
import pytest
import torch
from helpers import assert_same_bits, run

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import random_pipeline

import fastdiff
from fastdiff.pictures.recipe import from_object

FAST = {"steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_pipeline.make(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture
def pipe(folder):
    return fastdiff.load(folder, device="cpu", accelerate=False)


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    kind = "StableDiffusionInstructPix2PixPipeline"
    return random_pipeline.make(tmp_path_factory.mktemp("edit") / "model", in_channels=8, kind=kind)


def test_of_the_command_line(folder, tmp_path):
    """Two prompts in three batches, with their labels beside."""
    out = tmp_path / "a.png"
    asked = ("-n", 3, "--batch-size", 2, "--steps", 2, "--seed", 5, "--negative", "a dragon", "--device", "cpu")
    assert run("sample", "a woman", "a red pilot", "--model", folder, "--out", out, *asked).exit_code == 0
    again = run("reproduce", out)
    assert again.exit_code == 0, again.output
    assert "identical, to the bit" in again.output
    assert "of 'a woman' …" in again.output
    recipe = fastdiff.read_recipe(out)
    assert recipe.words.prompts == ["a woman"] * 3 + ["a red pilot"] * 3
    assert recipe.words.negative_prompts == ["a dragon"]
    assert len(recipe.to_json()) < 8192  # the words, not their embeddings
    other = run("reproduce", out, "--model", folder / "unet")
    assert other.exit_code == 2


@pytest.mark.parametrize(
    "asked",
    [
        {"n": 2},
        {"negative_prompt": ["a man", "a dragon"], "sampler": "euler"},
        {"image": torch.linspace(-1, 1, 3 * 64 * 64).view(3, 64, 64), "strength": 0.5, "sample_offset": 7},
        {"image": torch.zeros(2, 3, 64, 64), "mask": torch.arange(64).expand(64, 64) < 20},
        {"size": (32, 64), "guidance_interval": (0.1, 5.0)},
        {"guidance_scale": 1.0, "seeds": [4, 9]},
    ],
)
def test_a_recipe_is_the_call(pipe, tmp_path, asked):
    asked = {**FAST, "sampler": "ddim", **asked}
    prompts = ["a woman", "a blue dragon"]
    recipe, images = pipe.recipe(prompts, **asked), pipe(prompts, **asked)
    assert_same_bits(recipe.sample(pipe), images)
    path = pipe.save(images, tmp_path / "a.png", recipe=recipe)
    kept = fastdiff.read_recipe(path)
    assert kept.words == recipe.words
    assert fastdiff.reproduce(path, pipe).same_bits


@pytest.mark.parametrize("order", ["image", "words"])
def test_of_an_editing_checkpoint(editor, tmp_path, order):
    pipe = fastdiff.load(editor, device="cpu", accelerate=False)
    photo = torch.linspace(-1, 1, 3 * 64 * 64).view(3, 64, 64)
    asked = {"image": photo, "guidance_scale": 3.0, "image_guidance_scale": 1.2, "steps": 2}
    asked["guidance_order"] = order
    recipe = pipe.recipe("make the woman red", **asked)
    assert_same_bits(recipe.sample(pipe), pipe("make the woman red", **asked))
    path = pipe.save(recipe.sample(pipe), tmp_path / "a.png", recipe=recipe)
    assert fastdiff.reproduce(path).same_bits


@pytest.mark.parametrize(
    "scale", [1.0, 2.0, 3.0, [3.0, 1.0], torch.tensor(2.0), lambda level: 2.0, lambda level: level.sigma]
)
@pytest.mark.parametrize("order", ["image", "words"])
@pytest.mark.parametrize("image_scale", [1.0, 2.0])
def test_of_two_scales(editor, scale, order, image_scale):
    """Some outputs count for nothing, in all rows or in one, and are not computed; the recipe has the scales."""
    pipe = fastdiff.load(editor, device="cpu", accelerate=False)
    asked = {"image": torch.zeros(3, 64, 64), "steps": 2, "guidance_order": order}
    asked |= {"guidance_scale": scale, "image_guidance_scale": image_scale}
    recipe = from_object(json.loads(pipe.recipe("a man", **asked).to_json()))
    assert_same_bits(recipe.sample(pipe), pipe("a man", **asked))


def test_of_batches_that_are_invariant(folder, tmp_path):
    pipe = fastdiff.load(folder, device="cpu", batch_invariant=True)
    recipe = pipe.recipe("a woman", n=3, batch_size=2, **FAST)
    path = pipe.save(recipe.sample(pipe), tmp_path / "a.png", recipe=recipe)
    again = fastdiff.reproduce(path)
    assert again.same_bits
    assert not again.differences


def test_of_an_accelerated_pipeline(pipe, tmp_path):
    pipe.accelerate()
    recipe = pipe.recipe("a woman", **FAST)
    assert recipe.network.accelerated is not None
    path = pipe.save(recipe.sample(pipe), tmp_path / "a.png", recipe=recipe)
    assert fastdiff.reproduce(path).same_bits


def test_the_identity_is_of_all_parts(pipe, tmp_path):
    recipe = pipe.recipe("a woman", **FAST)
    before = pipe.identity()
    path = pipe.save(recipe.sample(pipe), tmp_path / "a.png", recipe=recipe)
    assert pipe.identity() == before  # a tokenizer that was called is the same one
    for part in (pipe.pipe.unet, pipe.pipe.vae, pipe.pipe.text_encoder):
        weight = next(part.parameters())
        with torch.no_grad():
            weight += 1
            with pytest.raises(ValueError, match="was made by another network"):
                fastdiff.reproduce(path, pipe)
            weight -= 1
    pipe.pipe.tokenizer.add_tokens(["mermaid"])
    with pytest.raises(ValueError, match="was made by another network"):
        fastdiff.reproduce(path, pipe)


def test_a_network_draws_no_words(pipe):
    with pytest.raises(TypeError, match=r"a pipeline of fastdiff\.load draws; got UNet2DConditionModel"):
        pipe.recipe("a woman", **FAST).sample(pipe.pipe.unet)


@pytest.mark.parametrize("wrong", [{"prompts": ["one"]}, {"prompts": [1, 2]}, {"prompts": ["a", "b"], "size": 3},
                                   {"prompts": ["a", "b"], "negative_prompts": ["a", "b", "c"]},
                                   {"prompts": ["a", "b"], "negative_prompts": []}])  # fmt: skip
def test_damaged_words_are_refused(pipe, wrong):
    content = json.loads(pipe.recipe(["a woman", "a man"], **FAST).to_json())
    content["words"] = wrong
    with pytest.raises((ValueError, msgspec.ValidationError)):
        from_object(content)


def test_what_is_no_data_is_refused(pipe):
    with pytest.raises(ValueError, match="a recipe cannot hold generator"):
        pipe.recipe("a woman", generator=torch.Generator(), **FAST)
    with pytest.raises(TypeError, match="promptz"):
        pipe.recipe("a woman", promptz=1, **FAST)


def test_older_recipes_have_no_words():
    recipe = fastdiff.Recipe.of(torch.nn.Conv2d(1, 1, 1), (1, 1, 8, 8), steps=2)
    assert "words" not in json.loads(recipe.to_json())
