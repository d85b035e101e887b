"""Our pipeline beside diffusers' own four, on the same random weights and the same starting noise."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import diffusers
import random_pipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import fastdiff

diffusers.utils.logging.disable_progress_bar()
PROMPTS = ["a woman firefighter, dark skin", "a red dragon, noto style"]
NEGATIVES = ["blue", "a man"]
STEPS = 6
SAMPLERS = {"ddim": ("DDIMScheduler", {}), "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
            "euler": ("EulerDiscreteScheduler", {})}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    make = random_pipeline.make
    return {
        4: make(root / "words"),
        8: make(root / "edit", in_channels=8, kind="StableDiffusionInstructPix2PixPipeline"),
        9: make(root / "fill", in_channels=9, kind="StableDiffusionInpaintPipeline", prediction="epsilon"),
    }


@pytest.fixture
def no_posterior_noise(monkeypatch):
    """diffusers draws an image's latents from the posterior; ours are its mean."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def theirs(folder, kind, sampler):
    pipe = getattr(diffusers, kind).from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    name, more = SAMPLERS[sampler]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(pipe, ours, kwargs, our_kwargs, noise):
    """Latents after every step within 1e-4 of their size, pictures within 1/255 but for a thousandth of the pixels."""
    steps, states = [], []

    def keep(pipe, i, t, told):
        steps.append(told["latents"].clone())
        return told

    images = pipe(PROMPTS, num_inference_steps=STEPS, negative_prompt=NEGATIVES, output_type="pt",
                  callback_on_step_end=keep, **kwargs).images * 2 - 1  # fmt: skip
    our_kwargs |= {"noise_fn": lambda stream, draw, shape: noise}
    if our_kwargs["sampler"] == "dpmpp_2m":  # diffusers' class divides by one step more than its other ones
        our_kwargs |= {"spacing": fastdiff.Spacing(timesteps=pipe.scheduler.timesteps.tolist())}
    if our_kwargs["sampler"] == "euler":  # diffusers starts from √(σ² + 1), ours from σ
        our_kwargs |= {"x_T": noise * float(pipe.scheduler.sigmas[0].square().add(1).sqrt())}
    drawn = ours(PROMPTS, negative_prompt=NEGATIVES, steps=STEPS,
                 callback=lambda state: states.append(state.x), **our_kwargs)  # fmt: skip
    assert len(states) == len(steps) > 0
    for ours_, theirs_ in zip(states, steps, strict=True):
        assert float((ours_ - theirs_).abs().max()) <= 1e-4 * max(1.0, float(theirs_.abs().max()))
    bytes_apart = ((drawn - images).abs() * 127.5).round()
    assert float((bytes_apart > 1).float().mean()) <= 1e-3


@pytest.fixture
def noise(rng):
    return torch.randn(2, 4, 16, 16)


@pytest.fixture
def image(rng):
    return torch.rand(2, 3, 64, 64) * 2 - 1


@pytest.fixture
def mask(rng):
    return torch.rand(16, 16).repeat_interleave(4, 0).repeat_interleave(4, 1) > 0.5


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_to_image(folders, noise, sampler, accelerate):
    ours = fastdiff.load(folders[4], device="cpu", accelerate=accelerate)
    assert (ours.report is not None) == accelerate
    compare(theirs(folders[4], "StableDiffusionPipeline", sampler), ours,
            {"latents": noise, "guidance_scale": 5.0}, {"sampler": sampler, "guidance_scale": 5.0}, noise)  # fmt: skip


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_image_to_image(folders, noise, image, sampler, no_posterior_noise, monkeypatch):
    monkeypatch.setattr(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor", lambda *a, **k: noise
    )
    pipe = theirs(folders[4], "StableDiffusionImg2ImgPipeline", sampler)
    told = {"strength": 0.7, "guidance_scale": 3.0}
    compare(pipe, fastdiff.load(folders[4], device="cpu"), {"image": (image + 1) / 2, **told},
            {"image": image, "sampler": sampler, **told}, noise)  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(folders, noise, image, mask, channels, strength, no_posterior_noise, monkeypatch):
    monkeypatch.setattr(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint.randn_tensor", lambda *a, **k: noise
    )
    pipe = theirs(folders[channels], "StableDiffusionInpaintPipeline", "ddim")
    painted = (~mask).float()[None, None]  # diffusers' white is painted
    told = {"strength": strength, "guidance_scale": 3.0}
    compare(pipe, fastdiff.load(folders[channels], device="cpu"),
            {"image": (image + 1) / 2, "mask_image": painted, "height": 64, "width": 64, **told},
            {"image": image, "mask": mask, "sampler": "ddim", **told}, noise)  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_editing(folders, noise, image, sampler):
    pipe = theirs(folders[8], "StableDiffusionInstructPix2PixPipeline", sampler)
    told = {"guidance_scale": 4.0, "image_guidance_scale": 1.7}
    compare(pipe, fastdiff.load(folders[8], device="cpu"), {"image": (image + 1) / 2, "latents": noise, **told},
            {"image": image, "sampler": sampler, **told}, noise)  # fmt: skip
