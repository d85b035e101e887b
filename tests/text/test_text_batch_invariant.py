"""A pipeline's pictures in any batch: text encoder, UNet and autoencoder, ours and diffusers' own."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
from random_pipeline import make

import fastdiff

PROMPTS = ["a woman pilot", "a dragon", "a man , dark skin", "a firefighter"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sd"))


def same_everywhere(pipe, prompts, **options):
    whole = pipe(prompts, seed=42, **options)
    for begin, count in ((0, 1), (1, 2), (1, 3)):
        part = pipe(prompts[begin : begin + count], seed=42, sample_offset=begin, **options)
        assert torch.equal(part, whole[begin : begin + count])


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_pictures_of_words(folder, dtype):
    pipe = fastdiff.load(folder, device="cpu", dtype=dtype, batch_invariant=True)
    assert "text_encoder: transformers.CLIPTextModel" in str(pipe.report)
    same_everywhere(pipe, PROMPTS, steps=3, guidance_scale=4.0, negative_prompt="red")


def test_pictures_from_pictures(folder, seed):
    pipe = fastdiff.load(folder, device="cpu", batch_invariant=True)
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    mask = torch.rand(4, 1, 64, 64) < 0.5
    whole = pipe(PROMPTS, image=images, mask=mask, steps=3, seed=42)
    part = pipe(PROMPTS[1:3], image=images[1:3], mask=mask[1:3], steps=3, seed=42, sample_offset=1)
    assert torch.equal(part, whole[1:3])


def test_the_pipeline_of_diffusers(folder, seed):
    """Its own call, with the text encoder on several prompts at once."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    fastdiff.accelerate(pipe, batch_invariant=True)
    latents = torch.randn(4, 4, 16, 16)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    whole = pipe(PROMPTS, latents=latents, **options).images
    part = pipe(PROMPTS[1:3], latents=latents[1:3], **options).images
    assert torch.equal(part, whole[1:3])
    fastdiff.restore(pipe)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert not any("forward" in module.__dict__ for part in parts for module in part.modules())


def test_what_is_refused(folder):
    with pytest.raises(ValueError, match="batch_invariant=True is a promise of accelerate; accelerate is False"):
        fastdiff.load(folder, batch_invariant=True, accelerate=False)
    with pytest.raises(TypeError, match="batch_invariant must be a bool; got str"):
        fastdiff.load(folder, batch_invariant="yes")
    pipe = fastdiff.load(folder, device="cpu", accelerate=False)
    pipe.pipe.vae.decoder.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(ValueError, match="the hooks of its Decoder see the whole batch"):
        pipe.accelerate(batch_invariant=True)
    parts = (pipe.pipe.unet, pipe.pipe.vae, pipe.pipe.text_encoder)
    assert not any("forward" in module.__dict__ for part in parts for module in part.modules())  # none of them


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packaged_emoji(dtype):
    pipe = fastdiff.load("emoji", device="cpu", dtype=dtype, batch_invariant=True)
    prompts = ["a pilot, flat style", "a woman firefighter, dark skin, noto style", "a cook", "a mermaid, noto style"]
    same_everywhere(pipe, prompts, steps=2)
