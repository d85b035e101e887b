"""Pipelines: every network accelerated or named, schedulers as the pipeline corrected them, what others do to them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
import diffusers
from matrix import CROSS, assert_equal, controlnet, cross, difference, dit, filled, flux, motion, pixels, sd3, vae, xl
from networks import VAE

import fastdiff

pytestmark = pytest.mark.networks

diffusers.utils.logging.disable_progress_bar()
NONE = dict(
    text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
)
LATENT = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(scheduler=None, kind="StableDiffusionPipeline", **more):
    torch.manual_seed(0)
    scheduler = scheduler or diffusers.DDIMScheduler(**LATENT)
    options = NONE | {"vae": vae(), "unet": cross().network, "scheduler": scheduler} | more
    return quiet(getattr(diffusers, kind)(**options))


def prompt(batch=1):
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(2 * batch, 7, 48, generator=generator).chunk(2)
    return {"prompt_embeds": both[0], "negative_prompt_embeds": both[1]}


def images(pipe, **more):
    options = {"num_inference_steps": 3, "output_type": "np", "height": 16, "width": 16, **prompt()} | more
    return pipe(generator=torch.Generator().manual_seed(0), **options).images


def same(a, b, tolerance=1e-4):
    assert np.isfinite(a).all()
    error = float(np.abs(a - b).max())
    assert error <= tolerance, f"images differ by {error:.2e} of [0, 1]"


def agree(make, call, tolerance=1e-4, dtype=torch.float32):
    """The accelerated pipeline's images are the eager one's; after restore to the bit."""
    pipe = make()
    before = call(pipe)
    report = fastdiff.accelerate(pipe, dtype=dtype)
    named(pipe, report)
    same(call(pipe), before, tolerance)
    same(call(pipe), before, tolerance)
    fastdiff.restore(pipe)
    same(call(pipe), before, 0.0)
    return report


def named(pipe, report):
    """Every network and every scheduler of a pipeline is accelerated, or named with words that say why not."""
    text = str(report)
    for name, value in pipe.components.items():
        if isinstance(value, nn.Module) or hasattr(value, "set_timesteps"):
            assert name in report.networks or name in report.changed or name in report.kept, f"{name} is not named"
            assert name in text


SCHEDULERS = {
    "DDIM": lambda: diffusers.DDIMScheduler(**LATENT),
    "PNDM": lambda: diffusers.PNDMScheduler(**LATENT, skip_prk_steps=True),
    "DDPM": lambda: diffusers.DDPMScheduler(**LATENT),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**LATENT),
    "DPM": lambda: diffusers.DPMSolverMultistepScheduler(**LATENT),
    "LCM": lambda: diffusers.LCMScheduler(**LATENT),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(**LATENT),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**LATENT),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_config_that_a_pipeline_corrected(seed, name):
    """steps_offset and clip_sample of an old scheduler, which StableDiffusionPipeline repairs."""
    pipe = stable_diffusion(SCHEDULERS[name]())
    before = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    pipe.scheduler.set_timesteps(3)
    times = pipe.scheduler.timesteps.tolist()
    want = images(pipe)
    fastdiff.accelerate(pipe, dtype=torch.float32)
    after = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    assert {k: after[k] for k in before if k in after} == {k: before[k] for k in before if k in after}
    pipe.scheduler.set_timesteps(3)
    assert pipe.scheduler.timesteps.tolist() == times
    same(images(pipe), want)


@pytest.mark.parametrize("change", [
    {"clip_sample": True, "clip_sample_range": 0.7}, {"steps_offset": 3}, {"timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction"}, {"set_alpha_to_one": False},
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_any_config_that_was_registered_later(seed, change):
    pipe = stable_diffusion()
    pipe.scheduler.register_to_config(**change)
    want = images(pipe)
    fastdiff.accelerate(pipe, dtype=torch.float32)
    for key, value in change.items():
        assert pipe.scheduler.config[key] == value
    same(images(pipe), want)


@pytest.mark.parametrize("name", ["DDIM", "Euler", "DPM", "Heun"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scheduler_that_the_user_exchanges(seed, name):
    """It is used, and stays his after restore, which restores the networks all the same."""
    pipe = stable_diffusion()
    twin = stable_diffusion()
    fastdiff.accelerate(pipe, dtype=torch.float32)
    images(pipe)
    kind = type(SCHEDULERS[name]())
    mine = pipe.scheduler = kind.from_config(pipe.scheduler.config)
    twin.scheduler = kind.from_config(twin.scheduler.config)
    want = images(twin)
    same(images(pipe), want)
    fastdiff.restore(pipe)
    assert pipe.scheduler is mine
    same(images(pipe), want, 0.0)
    assert not any("forward" in m.__dict__ for m in pipe.unet.modules())


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_network_that_the_user_exchanges(seed, part):
    pipe, twin = stable_diffusion(), stable_diffusion()
    old = getattr(pipe, part)
    fastdiff.accelerate(pipe, dtype=torch.float32)
    images(pipe)
    torch.manual_seed(5)
    new = cross().network if part == "unet" else vae()
    setattr(pipe, part, new)
    setattr(twin, part, copy.deepcopy(new))
    want = images(twin)
    same(images(pipe), want)
    fastdiff.restore(pipe)
    assert getattr(pipe, part) is new
    same(images(pipe), want, 0.0)
    assert not any("forward" in m.__dict__ for m in old.modules())


def xl_pipeline():
    torch.manual_seed(0)
    return quiet(diffusers.StableDiffusionXLPipeline(
        vae=vae(), unet=xl().network, scheduler=diffusers.EulerDiscreteScheduler(**LATENT), text_encoder=None,
        text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False,
    ))  # fmt: skip


def xl_call(pipe, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    pooled = torch.randn(2, 32, generator=generator).to(dtype).chunk(2)
    embeds = {k: v.to(dtype) for k, v in prompt().items()}
    return images(pipe, pooled_prompt_embeds=pooled[0], negative_pooled_prompt_embeds=pooled[1], **embeds)


def test_xl(seed):
    agree(xl_pipeline, xl_call)


def test_xl_in_float16_with_an_autoencoder_that_overflows(seed):
    """force_upcast: the pipeline moves the autoencoder to float32 for decoding. Black images are the known failure."""
    pipe = xl_pipeline()
    pipe.vae.decoder.conv_in.weight.data.mul_(3e4)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.to(torch.float16)
    twin = copy.deepcopy(pipe)
    fastdiff.accelerate(pipe)
    want, got = xl_call(twin, torch.float16), xl_call(pipe, torch.float16)
    assert np.isfinite(want).all()
    assert np.isfinite(got).all()
    assert float(np.abs(got - want).mean()) <= 0.03
    got = xl_call(pipe, torch.float16)
    assert np.isfinite(got).all()


def with_controlnet():
    torch.manual_seed(1)
    return stable_diffusion(kind="StableDiffusionControlNetPipeline", controlnet=controlnet().network)


def control(pipe, **more):
    return images(pipe, image=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4)), **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_controlnet(seed, dtype):
    report = agree(with_controlnet, control, 1e-4 if dtype == torch.float32 else 0.15, dtype)
    assert "controlnet" in report.networks or "controlnet" in report.kept


@pytest.mark.parametrize("only_unet", [False, True])
def test_controlnet_with_another_dtype_of_the_unet(seed, only_unet):
    """Only one of the two networks computes in bfloat16."""
    pipe = with_controlnet()
    before = control(pipe)
    fastdiff.accelerate(pipe.unet if only_unet else pipe.controlnet, dtype=torch.bfloat16)
    same(control(pipe), before, 0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t2i_adapter(seed, dtype):
    def make():
        torch.manual_seed(1)
        net = filled(diffusers.T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=2))
        return stable_diffusion(kind="StableDiffusionAdapterPipeline", adapter=net)

    try:
        images(make(), image=torch.rand(1, 3, 16, 16))
    except ValueError as error:
        pytest.skip(f"the pipeline itself does not run: {error}")
    call = lambda pipe: images(pipe, image=torch.ones(1, 3, 16, 16) / 3)  # noqa: E731
    report = agree(make, call, 1e-4 if dtype == torch.float32 else 0.15, dtype)
    assert "adapter" in report.networks or "adapter" in report.kept


def test_img2img(seed):
    picture = torch.rand(1, 3, 16, 16)
    agree(lambda: stable_diffusion(kind="StableDiffusionImg2ImgPipeline"),
          lambda p: images_of(p, image=picture, strength=0.7))  # fmt: skip


def images_of(pipe, **more):
    options = {"num_inference_steps": 3, "output_type": "np", **prompt()} | more
    return pipe(generator=torch.Generator().manual_seed(0), **options).images


def test_inpaint(seed):
    picture, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    agree(lambda: stable_diffusion(kind="StableDiffusionInpaintPipeline"),
          lambda p: images(p, image=picture, mask_image=mask, strength=1.0))  # fmt: skip


def test_a_transformers_pipeline(seed):
    def make():
        torch.manual_seed(0)
        return quiet(
            diffusers.DiTPipeline(
                transformer=dit(out_channels=8).network, vae=vae(), scheduler=diffusers.DDIMScheduler()
            )
        )

    def call(pipe):
        return pipe([1], guidance_scale=1.0, num_inference_steps=2, output_type="np",
                    generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    report = agree(make, call)
    assert "transformer" in report.networks


@pytest.mark.parametrize("kind", ["flux", "sd3", "motion", "vq"])
def test_every_network_of_a_pipeline_is_named(seed, kind):
    """Without a run: other pipelines' parts."""
    torch.manual_seed(0)
    none = dict(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    if kind == "flux":
        pipe = diffusers.FluxPipeline(transformer=flux().network, vae=vae(), scheduler=flow, **none)
    elif kind == "sd3":
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=sd3().network, vae=vae(), scheduler=flow, text_encoder_3=None, tokenizer_3=None,
            **none)  # fmt: skip
    elif kind == "motion":
        pipe = diffusers.AnimateDiffPipeline(vae=vae(), text_encoder=None, tokenizer=None, unet=motion().network,
                                             motion_adapter=None,
                                             scheduler=diffusers.DDIMScheduler(**LATENT))  # fmt: skip
    else:
        vq = filled(diffusers.VQModel(**VAE, num_vq_embeddings=32, vq_embed_dim=4))
        pipe = diffusers.LDMSuperResolutionPipeline(vqvae=vq, unet=pixels(in_channels=8, out_channels=4).network,
                                                    scheduler=diffusers.DDIMScheduler())  # fmt: skip
    report = fastdiff.accelerate(pipe, dtype=torch.float32)
    named(pipe, report)
    main = {"flux": "transformer", "sd3": "transformer", "motion": "unet", "vq": "vqvae"}[kind]
    assert main in report.networks or "left alone" in report.kept[main] or "would be faster" in report.kept[main]
    fastdiff.restore(pipe)
    for value in pipe.components.values():
        if isinstance(value, nn.Module):
            assert not any("forward" in m.__dict__ for m in value.modules())


def test_a_text_encoder_is_accelerated_or_named(seed):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, max_position_embeddings=16)  # fmt: skip
    encoder = filled(transformers.CLIPTextModel(config))
    pipe = stable_diffusion(text_encoder=encoder)
    ids = torch.randint(0, 49, (2, 9))
    with torch.no_grad():
        want = encoder(ids).last_hidden_state
        named(pipe, fastdiff.accelerate(pipe, dtype=torch.float32))
        assert_equal(pipe.text_encoder(ids).last_hidden_state, want)


@pytest.mark.parametrize("backend", ["eager"])
def test_a_compiled_network_of_a_pipeline(seed, backend):
    """Reached through to the module, or named with the reason."""
    pipe = stable_diffusion()
    want = images(pipe)
    torch._dynamo.reset()
    compiled = pipe.unet = torch.compile(pipe.unet, backend=backend)
    report = fastdiff.accelerate(pipe, dtype=torch.float32)
    named(pipe, report)
    same(images(pipe), want)
    fastdiff.restore(pipe)
    assert pipe.unet is compiled
    same(images(pipe), want)


def test_accelerate_twice(seed):
    pipe = stable_diffusion()
    want = images(pipe)
    report = fastdiff.accelerate(pipe, dtype=torch.float32)
    assert fastdiff.accelerate(pipe, dtype=torch.float32) is report
    with pytest.raises(ValueError, match="restore"):
        fastdiff.accelerate(pipe, dtype=torch.bfloat16)
    same(images(pipe), want)
    fastdiff.restore(pipe)
    same(images(pipe), want, 0.0)


def test_pipelines_that_share_components(seed):
    """from_pipe; the shared networks are restored once, by whoever had them accelerated."""
    pipe = stable_diffusion()
    want = images(pipe)
    other = quiet(diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))
    fastdiff.accelerate(pipe, dtype=torch.float32)
    named(other, fastdiff.accelerate(other, dtype=torch.float32))
    same(images(other), want)
    fastdiff.restore(pipe)
    same(images(other), want)
    fastdiff.restore(other)
    same(images(other), want, 0.0)
    same(images(pipe), want, 0.0)


# ---- what other libraries do to a pipeline


def lora_weights(pipe):
    """A LoRA's state dict, as pipe.load_lora_weights reads it."""
    peft = pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_diffusers

    other = copy.deepcopy(pipe.unet)
    if any("forward" in m.__dict__ for m in other.modules()):
        fastdiff.restore(other)
    torch.manual_seed(9)
    other.add_adapter(
        peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"], init_lora_weights=False)
    )
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(other))
    return {f"unet.{k}": v for k, v in state.items()}


@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_a_loras_life_in_a_pipeline(seed, when):
    pipe, twin = stable_diffusion(), stable_diffusion()
    state = lora_weights(twin)
    plain = images(twin)
    if when != "before":
        fastdiff.accelerate(pipe, dtype=torch.float32)
    if when == "later":
        same(images(pipe), plain)
    steps = [
        lambda p: p.load_lora_weights(dict(state), adapter_name="a"),
        lambda p: p.set_adapters(["a"], [0.4]),
        lambda p: p.fuse_lora(lora_scale=1.5),
        lambda p: p.unfuse_lora(),
        lambda p: p.disable_lora(),
        lambda p: p.enable_lora(),
        lambda p: p.unload_lora_weights(),
    ]
    for i, step in enumerate(steps):
        step(twin)
        step(pipe)
        if i == 0 and when == "before":
            fastdiff.accelerate(pipe, dtype=torch.float32)
        want = images(twin)
        if i == 0:
            assert np.abs(want - plain).max() > 1e-2
        same(images(pipe), want)
    fastdiff.restore(pipe)
    same(images(pipe), plain, 1e-5)


@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_deepcache(seed, when):
    """It patches the forwards of the network and of its blocks, and gives them back."""
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper
    pipe, twin = stable_diffusion(), stable_diffusion()
    plain = images(twin, num_inference_steps=6)

    def enable(p):
        h = helper(pipe=p)
        h.set_params(cache_interval=3, cache_branch_id=0)
        h.enable()
        return h

    if when == "before":
        ours = enable(pipe)
        fastdiff.accelerate(pipe, dtype=torch.float32)
    else:
        fastdiff.accelerate(pipe, dtype=torch.float32)
        if when == "later":
            images(pipe)
        ours = enable(pipe)
    theirs = enable(twin)
    want = images(twin, num_inference_steps=6)
    assert np.abs(want - plain).max() > 1e-3
    same(images(pipe, num_inference_steps=6), want)
    ours.disable()
    theirs.disable()
    same(images(pipe, num_inference_steps=6), plain)
    fastdiff.restore(pipe)
    same(images(pipe, num_inference_steps=6), plain, 0.0)


def test_deepcache_stays_after_restore(seed):
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper
    pipe, twin = stable_diffusion(), stable_diffusion()
    for p in (pipe, twin):
        h = helper(pipe=p)
        h.set_params(cache_interval=3, cache_branch_id=0)
        h.enable()
    want = images(twin, num_inference_steps=6)
    fastdiff.accelerate(pipe, dtype=torch.float32)
    same(images(pipe, num_inference_steps=6), want)
    fastdiff.restore(pipe)
    same(images(pipe, num_inference_steps=6), want, 0.0)


@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_tomesd(seed, when):
    """Token merging exchanges the classes of transformer blocks, and puts hooks on the network."""
    tomesd = pytest.importorskip("tomesd")
    pipe, twin = stable_diffusion(), stable_diffusion()
    plain = images(twin)
    apply = lambda p: tomesd.apply_patch(p, ratio=0.5, use_rand=False)  # noqa: E731
    if when == "before":
        apply(pipe)
    fastdiff.accelerate(pipe, dtype=torch.float32)
    if when == "later":
        same(images(pipe), plain)
    if when != "before":
        apply(pipe)
    apply(twin)
    want = images(twin)
    assert np.abs(want - plain).max() > 1e-3
    same(images(pipe), want)
    for p in (pipe, twin):
        tomesd.remove_patch(p)
    same(images(pipe), plain)
    fastdiff.restore(pipe)
    same(images(pipe), plain, 0.0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_offload_hooks_on_the_roots(seed, when):
    """enable_model_cpu_offload's hooks run as often as without acceleration, and after restore, too."""
    hooks = pytest.importorskip("accelerate.hooks")
    counts = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            counts.append(type(module).__name__)
            return args, kwargs

    def add(p):
        for part in (p.unet, p.vae.decoder):
            hooks.add_hook_to_module(part, Counting())

    pipe, twin = stable_diffusion(), stable_diffusion()
    add(twin)
    want = images(twin)
    wanted = list(counts)
    assert wanted
    if when == "before":
        add(pipe)
        fastdiff.accelerate(pipe, dtype=torch.float32)
    else:
        fastdiff.accelerate(pipe, dtype=torch.float32)
        add(pipe)
    counts.clear()
    same(images(pipe), want)
    assert counts == wanted
    fastdiff.restore(pipe)
    counts.clear()
    same(images(pipe), want, 0.0)
    assert counts == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_that_is_moved_to_another_dtype(seed, dtype):
    pipe = stable_diffusion()
    fastdiff.accelerate(pipe, dtype=torch.float32)
    images(pipe)
    pipe.to(dtype)
    embeds = {k: v.to(dtype) for k, v in prompt().items()}
    try:
        twin = stable_diffusion().to(dtype)
        want = images(twin, **embeds)
    except Exception as error:
        pytest.skip(f"the pipeline itself does not run so: {error}")
    same(images(pipe, **embeds), want, 1e-4 if dtype == torch.float64 else 0.3)
    pipe.to(torch.float32)
    assert np.isfinite(images(pipe)).all()


@pytest.mark.parametrize("feature", ["freeu", "tiling", "slicing", "fused projections", "attention slicing"])
def test_features_that_are_switched_on_afterwards(seed, feature):
    pipe, twin = stable_diffusion(), stable_diffusion()
    fastdiff.accelerate(pipe, dtype=torch.float32)
    images(pipe)
    switch = {
        "freeu": lambda p: p.enable_freeu(0.9, 0.2, 1.4, 1.6),
        "tiling": lambda p: p.vae.enable_tiling(),
        "slicing": lambda p: p.vae.enable_slicing(),
        "fused projections": lambda p: p.fuse_qkv_projections(),
        "attention slicing": lambda p: p.enable_attention_slicing(),
    }[feature]
    for p in (pipe, twin):
        switch(p)
    want = images(twin)
    same(images(pipe), want)
    fastdiff.restore(pipe)
    same(images(pipe), want, 0.0)


def test_seamless_tiling(seed):
    """padding_mode="circular" on every convolution of a pipeline that is accelerated already."""
    pipe, twin = stable_diffusion(), stable_diffusion()
    plain = images(twin)
    fastdiff.accelerate(pipe, dtype=torch.float32)
    images(pipe)
    for p in (pipe, twin):
        for network in (p.unet, p.vae):
            for m in network.modules():
                if isinstance(m, nn.Conv2d):
                    m.padding_mode = "circular"
    want = images(twin)
    assert np.abs(want - plain).max() > 1e-3
    same(images(pipe), want)


def test_config_of_cross():
    assert CROSS["cross_attention_dim"] == 48
    assert difference(torch.ones(2), torch.ones(2)) == 0
