"""Our schedulers in diffusers' pipelines, and accelerate and restore, which put them there."""

import inspect
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers

import fastdiff
import fastdiff.integrations.diffusers as ours

diffusers.utils.logging.disable_progress_bar()
NAMES = list(ours.SCHEDULERS)
# Those of other models than Stable Diffusion's.
OTHERS = {name for name in NAMES if name.startswith(("FlowMatch", "EDM", "Cosine", "CogVideoX", "UnCLIP", "DDPMWue"))}
OTHERS |= {"DDIMInverseScheduler", "SCMScheduler", "IPNDMScheduler"}


def unet(**more):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8, **more,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_image_pipelines(tmp_path, kind):
    pipe = getattr(diffusers, f"{kind}Pipeline")(unet(), getattr(diffusers, f"{kind}Scheduler")())
    pipe.set_progress_bar_config(disable=True)
    options = {"eta": 0.5} if kind == "DDIM" else {}

    def images():
        return pipe(2, torch.manual_seed(0), num_inference_steps=4, output_type="np", **options).images

    before, scheduler = images(), pipe.scheduler
    report = fastdiff.accelerate(pipe, dtype=torch.float32)
    assert type(pipe.scheduler) is getattr(ours, f"{kind}Scheduler")
    assert abs(images() - before).max() <= 1e-4
    lines = str(report).splitlines()
    assert lines[:3] == [
        f"diffusers.{kind}Pipeline:",
        f"  scheduler: diffusers.{kind}Scheduler -> fastdiff.{kind}Scheduler",
        "  unet: diffusers.UNet2DModel, computing in float32, channels_last:",
    ]
    assert "ResnetBlock2D" in lines[4]
    with pytest.raises(ValueError, match="accelerated already"):
        fastdiff.accelerate(pipe)
    pipe.save_pretrained(tmp_path)  # a plain pipeline of diffusers'
    assert type(type(pipe).from_pretrained(tmp_path).scheduler) is type(scheduler)
    fastdiff.restore(pipe)
    assert pipe.scheduler is scheduler
    assert abs(images() - before).max() == 0
    with pytest.raises(ValueError, match="is not accelerated"):
        fastdiff.restore(pipe)


@pytest.mark.slow
def test_stable_diffusion():
    """Text to image and image to image of a network of random weights, with every scheduler that it takes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=50, **sizes))
    parts = {"vae": vae, "text_encoder": text, "tokenizer": None, "unet": network, "safety_checker": None}
    parts |= {"feature_extractor": None, "requires_safety_checker": False}
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    config |= {"skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False}
    prompt = {"prompt_embeds": torch.randn(1, 4, 16), "negative_prompt_embeds": torch.randn(1, 4, 16)}
    image = torch.rand(1, 3, 16, 16)
    kinds = [n for n in NAMES if n not in OTHERS]
    for kind in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline):
        for name in kinds:
            middle = "image" in inspect.signature(kind.__call__).parameters
            if middle and name in ("PNDMScheduler", "LMSDiscreteScheduler"):
                continue  # begin otherwise, on purpose
            pipe = kind(scheduler=getattr(diffusers, name).from_config(config), **parts)
            pipe.set_progress_bar_config(disable=True)
            options = prompt | ({"image": image, "strength": 0.6} if middle else {"height": 16, "width": 16})
            results = []
            for accelerated in (False, True):
                if accelerated:
                    report = fastdiff.accelerate(pipe, dtype=torch.float32)
                    assert set(report.networks) == {"unet", "vae"}
                done = pipe(
                    num_inference_steps=6, eta=0.3, generator=torch.manual_seed(0), output_type="latent", **options
                )
                results.append(done.images)
            assert type(pipe.scheduler).__module__.startswith("fastdiff")
            fastdiff.restore(pipe)
            assert float((results[0] - results[1]).abs().max()) <= 2e-4 * max(1.0, float(results[0].abs().max())), name


def test_accelerate_refuses():
    for wrong in (torch.ones(2), "pipe", None):
        with pytest.raises(TypeError, match="or a diffusers pipeline; got"):
            fastdiff.accelerate(wrong)
        with pytest.raises(TypeError, match="or a diffusers pipeline; got"):
            fastdiff.restore(wrong)

    class Mine(diffusers.DDPMScheduler):
        pass

    pipe = diffusers.DDPMPipeline(unet().train(), Mine())
    with pytest.raises(ValueError, match="nothing for this DDPMPipeline: scheduler is"):
        fastdiff.accelerate(pipe)
    pipe.scheduler = diffusers.DDPMScheduler(variance_type="learned")
    with pytest.raises(ValueError, match="variance_type='learned'"):
        fastdiff.accelerate(pipe)
    pipe.scheduler = ours.DDPMScheduler()
    with pytest.raises(ValueError, match="nothing for this"):
        fastdiff.accelerate(pipe)
    pipe.scheduler = diffusers.DDPMScheduler()
    fastdiff.accelerate(pipe)
    assert fastdiff.accelerate(pipe) is fastdiff.accelerate(pipe)
    pipe.unet = unet()
    assert set(fastdiff.accelerate(pipe).networks) == {"unet"}  # what came since is accelerated, too
    assert "forward" in pipe.unet.__dict__
    pipe.scheduler = mine = diffusers.DDIMScheduler()  # the most usual thing to do with a pipeline
    fastdiff.restore(pipe)
    assert pipe.scheduler is mine
    with pytest.raises(ValueError, match="not accelerated"):
        fastdiff.restore(pipe)


def test_accelerate_keeps_tables_that_were_changed_by_hand():
    scheduler = diffusers.DDIMScheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    pipe = diffusers.DDIMPipeline(unet(), scheduler)
    pipe.scheduler = scheduler
    fastdiff.accelerate(pipe)
    assert pipe.scheduler.alphas_cumprod is scheduler.alphas_cumprod


@pytest.mark.slow
def test_accelerate_keeps_schedulers_that_ours_cannot_stand_in_for(seed):
    """Before a run, by name: the lists that ours would refuse in its midst."""

    def kept(scheduler, kind=diffusers.DDPMPipeline):
        pipe = kind(unet(), diffusers.DDPMScheduler())
        pipe.scheduler = scheduler
        before = torch.get_rng_state()
        report = fastdiff.accelerate(pipe)
        assert torch.equal(torch.get_rng_state(), before)
        assert ("scheduler" in report.kept) == (pipe.scheduler is scheduler)
        return str(report.kept.get("scheduler"))

    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for name in ("DDPM", "DDIM"):
        cls = getattr(diffusers, f"{name}Scheduler")
        assert "since epsilon says nothing of x_0" in kept(cls(**zero))
        assert kept(cls(**zero, prediction_type="v_prediction")) == "None"
        assert kept(cls(**zero | {"timestep_spacing": "leading"})) == "None"
    rising = {"use_karras_sigmas": True, "sigma_min": 0.002, "final_sigmas_type": "sigma_min"}
    assert "number 9 has 0.002 and the next" in kept(diffusers.EulerDiscreteScheduler(**rising))
    flow = {"use_flow_sigmas": True, "use_karras_sigmas": True, "prediction_type": "flow_prediction"}
    assert "use_karras_sigmas=True" in kept(diffusers.DPMSolverMultistepScheduler(**flow))
    for name in NAMES:
        # Those of two calls a step make a list of all timesteps when they are constructed.
        slow = name.startswith(("KDPM2", "DPMSolverSDE"))
        scheduler = getattr(diffusers, name)(**{"num_train_timesteps": 60} if slow else {})
        config = scheduler.config
        assert ours.unserved(ours.like(scheduler)) is None, name
        if "use_dynamic_shifting" in config and name.startswith("Flow"):
            assert kept(getattr(diffusers, name)(use_dynamic_shifting=True)) == "None"
        if "variance_type" in config:
            assert kept(getattr(diffusers, name)(variance_type="learned_range")) == "None"

    class Mine(diffusers.DDPMScheduler):
        pass

    assert "Mine, since it is a class of its own" in kept(Mine())
    assert "ScoreSdeVeScheduler, since its corrector" in kept(diffusers.ScoreSdeVeScheduler())

    class ChronoEditPipeline(diffusers.DDPMPipeline):
        pass

    class FromTheMiddle(diffusers.DDPMPipeline):
        def __call__(self, image, strength=0.8):
            pass

    assert "edits the scheduler's model_outputs" in kept(diffusers.UniPCMultistepScheduler(), ChronoEditPipeline)
    assert kept(diffusers.DDPMScheduler(), ChronoEditPipeline) == "None"
    assert "skip_prk_steps=True" in kept(diffusers.PNDMScheduler(), FromTheMiddle)
    assert kept(diffusers.PNDMScheduler(skip_prk_steps=True), FromTheMiddle) == "None"
    for name in ("ChronoEditPipeline", "LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL"):
        assert hasattr(diffusers, name)


def test_without_diffusers_the_extra_is_named():
    code = "import sys; sys.modules['diffusers'] = None; import fastdiff.integrations.diffusers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: fastdiff.integrations.diffusers needs diffusers: pip")
    assert "[diffusers]" in done.stderr.splitlines()[-1]


def test_pipelines_that_share_a_network():
    """The second's report names it, too, and restoring the second leaves it as the first made it."""
    first, second = (diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()) for network in [unet()] * 2)
    assert set(fastdiff.accelerate(first).networks) == {"unet"}
    report = fastdiff.accelerate(second)
    assert str(report.networks["unet"]) == str(fastdiff.accelerate(first).networks["unet"])
    fastdiff.restore(second)
    assert type(second.scheduler) is diffusers.DDPMScheduler
    assert type(first.scheduler) is ours.DDPMScheduler
    assert "forward" in first.unet.__dict__
    fastdiff.restore(first)
    assert not any("forward" in m.__dict__ for m in first.unet.modules())


def test_importing_fastdiff_imports_neither_diffusers_nor_integrations():
    code = (
        "import sys, fastdiff; print([m for m in sys.modules if m.startswith(('diffusers', 'fastdiff.integrations'))])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
