"""What a call of the pipeline takes and refuses, its numbering of pictures, and what passes through to sample."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import random_pipeline

import fastdiff
from fastdiff.text import load as loading
from fastdiff.text import prompts

FAST = {"steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_pipeline.make(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture(scope="module")
def pipe(folder):
    return fastdiff.load(folder, device="cpu")


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    kind = "StableDiffusionInstructPix2PixPipeline"
    return fastdiff.load(random_pipeline.make(tmp_path_factory.mktemp("edit") / "m", in_channels=8, kind=kind),
                         device="cpu")  # fmt: skip


@pytest.fixture(scope="module")
def filler(tmp_path_factory):
    kind = "StableDiffusionInpaintPipeline"
    return fastdiff.load(random_pipeline.make(tmp_path_factory.mktemp("fill") / "m", in_channels=9, kind=kind),
                         device="cpu")  # fmt: skip


@pytest.fixture
def photo(rng):
    return torch.rand(3, 64, 64) * 2 - 1


def first_input(pipe, monkeypatch, *args, **kwargs):
    """What the UNet is given first."""
    seen = []
    handle = pipe.pipe.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    try:
        pipe(*args, **kwargs)
    finally:
        handle.remove()
    return seen[0]


# ---- what is drawn


def test_prompts_and_noise_matter(pipe):
    images = pipe(["a woman", "a dragon"], n=2, seed=5, **FAST)
    assert images.shape == (4, 3, 64, 64)
    assert images.dtype == torch.float32
    assert float(images.abs().max()) <= 1
    assert len({image.numpy().tobytes() for image in images}) == 4
    assert_same_bits(images, pipe(["a woman", "a dragon"], n=2, seed=5, **FAST))
    assert not torch.equal(images, pipe(["a woman", "a dragon"], n=2, seed=6, **FAST))
    assert not torch.equal(images, pipe(["a woman", "a dragon"], n=2, seed=5, negative_prompt="blue", **FAST))


def test_batch_prefix_has_the_bits_of_noise(pipe, monkeypatch):
    few = first_input(pipe, monkeypatch, "a woman", n=2, steps=3, guidance_scale=1.0)
    many = first_input(pipe, monkeypatch, "a woman", n=5, steps=3, guidance_scale=1.0)
    rest = first_input(pipe, monkeypatch, "a woman", n=3, sample_offset=2, steps=3, guidance_scale=1.0)
    assert_same_bits(few, many[:2])
    assert_same_bits(rest, many[2:])
    assert float((pipe("a woman", n=2, **FAST) - pipe("a woman", n=5, **FAST)[:2]).abs().max()) < 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("kind", ["words", "image", "mask"])
def test_resume_to_the_bit(pipe, photo, sampler, kind):
    told = {"image": photo} if kind != "words" else {}
    told |= {"mask": torch.ones(64, 64).tril(), "strength": 0.8} if kind == "mask" else {}
    states = []
    whole = pipe("a woman", n=2, sampler=sampler, steps=5, callback=states.append, **told)
    for state in states[:-1]:
        assert_same_bits(pipe("a woman", n=2, sampler=sampler, steps=5, resume=state, **told), whole)


def test_strength(pipe, photo):
    assert_same_bits(pipe("a man", image=photo, strength=0, **FAST), pipe.decode(pipe.encode(photo[None])))
    assert_same_bits(pipe("a man", image=photo, strength=1, **FAST), pipe("a man", **FAST))
    assert_same_bits(pipe("a man", image=photo, **FAST), pipe("a man", image=photo, strength=0.6, **FAST))
    near, far = (pipe("a man", image=photo, strength=s, steps=10) for s in (0.1, 0.9))
    kept = pipe.decode(pipe.encode(photo[None]))
    assert (near - kept).abs().mean() < (far - kept).abs().mean()


def test_mask_keeps_what_is_white(pipe, photo):
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    states = []
    pipe("a man", image=photo, mask=mask, callback=states.append, **FAST)
    latents = pipe.encode(photo[None])
    torch.testing.assert_close(states[-1].x[..., :8], latents[..., :8])
    assert (states[-1].x[..., 8:] - latents[..., 8:]).abs().mean() > 1e-2


def test_pictures_of_any_kind(pipe, photo, tmp_path):
    pixels = ((photo.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "photo.png")
    exact = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    wanted = pipe("a man", image=exact, **FAST)
    for given in (tmp_path / "photo.png", str(tmp_path / "photo.png"), picture, exact[None], [picture]):
        assert float((pipe("a man", image=given, **FAST) - wanted).abs().max()) < 1e-3
    two = pipe(["a man", "a woman"], n=2, image=[picture, exact.flip(-1)], **FAST)
    assert two.shape[0] == 4
    mask = Image.fromarray(np.eye(64, dtype=np.uint8) * 255)
    assert_same_bits(pipe("a man", image=exact, mask=mask, **FAST),
                     pipe("a man", image=exact, mask=torch.eye(64).bool(), **FAST))  # fmt: skip
    assert pipe("a man", image=picture.resize((100, 90)), size=(32, 48), **FAST).shape == (1, 3, 32, 48)


def test_each_distinct_prompt_is_encoded_once(pipe, monkeypatch):
    seen = []
    real = type(pipe.pipe).encode_prompt

    def counted(self, text, **how):
        seen.append(text)
        return real(self, text, **how)

    monkeypatch.setattr(type(pipe.pipe), "encode_prompt", counted)
    pipe(["a man", "a woman", "a man"], n=2, negative_prompt=["blue", "red", "blue"], **FAST)
    assert seen == ["a man", "a woman", "blue", "red"]


def test_what_passes_through(pipe):
    plain = pipe("a man", n=2, **FAST)
    assert_same_bits(pipe("a man", n=2, seeds=[0, 7], **FAST)[:1], plain[:1])
    weak = pipe("a man", n=2, guidance_interval=(0.0, 0.5), **FAST)
    assert not torch.equal(weak, plain)
    plan = fastdiff.samplers.ddim(pipe.sampling["schedule"], 3, prediction="v_prediction",
                                 spacing=fastdiff.Spacing("trailing", final="sigma_min"))  # fmt: skip
    assert_same_bits(pipe("a man", sampler=plan, guidance_scale=2.0),
                     pipe("a man", sampler="ddim", spacing="trailing", **FAST))  # fmt: skip
    latents = []
    pipe("a man", callback=lambda state: latents.append(state.x), x_T=torch.ones(1, 4, 16, 16), **FAST)
    assert len(latents) == 3
    with pytest.raises(TypeError, match="sedd"):
        pipe("a man", sedd=3)


def test_restore(folder, photo):
    plain = fastdiff.load(folder, device="cpu", accelerate=False)
    pipe = fastdiff.load(folder, device="cpu")
    assert "ResnetBlock2D" in str(pipe.report)
    told = {"image": photo, **FAST}
    before = plain("a man", **told)
    assert float((pipe("a man", **told) - before).abs().max()) < 1e-3
    pipe.restore()
    assert pipe.report is None
    assert_same_bits(pipe("a man", **told), before)


def test_half_precision(folder, photo):
    """In bfloat16 the same picture by its rounding; the state stays float32."""
    exact = fastdiff.load(folder, device="cpu")("a man", image=photo, **FAST)
    half, states = fastdiff.load(folder, device="cpu", dtype=torch.bfloat16), []
    assert half.pipe.unet.dtype == half.pipe.vae.dtype == torch.bfloat16
    drawn = half("a man", image=photo, callback=states.append, **FAST)
    assert drawn.dtype == states[0].x.dtype == torch.float32
    assert float((drawn - exact).abs().mean()) < 0.02
    assert fastdiff.load(folder, device="cpu", dtype="auto").pipe.unet.dtype == torch.float32


def test_two_guidances(editor, photo):
    told = {"image": photo, "steps": 3}
    plain = editor("make the skin dark", guidance_scale=3.0, image_guidance_scale=1.5, **told)
    assert_same_bits(plain, editor("make the skin dark", guidance_scale=[3.0] * 3, image_guidance_scale=1.5, **told))
    assert_same_bits(plain, editor("make the skin dark", guidance_scale=lambda level: 3.0, **told))
    assert not torch.equal(plain, editor("make the skin dark", guidance_scale=3.0, image_guidance_scale=1.0, **told))
    assert not torch.equal(plain, editor("make the skin light", guidance_scale=3.0, **told))
    assert not torch.equal(plain, editor("make the skin dark", guidance_scale=3.0, strength=0.7, **told))


def test_words_before_the_picture(editor, photo):
    """The other order of the two guidances, by its formula; where the first scale is 1, a call fewer."""
    unet, told = editor.pipe.unet, {"steps": 3, "sampler": "euler", "seed": 4}
    empty, words = (prompts.keywords(editor.pipe, [text], (64, 64), unconditional=False) for text in ("", "a man"))
    beside = editor.encode(photo[None]) / editor.pipe.vae.config.scaling_factor

    def guided(x, t):
        calls = ((empty, 0 * beside), (words, 0 * beside), (words, beside))
        nothing, said, both = (unet(torch.cat([x, at], 1), t, **how).sample for how, at in calls)
        return nothing + 3.0 * (said - nothing) + 1.5 * (both - said)

    how = {"image": photo, "image_guidance_scale": 1.5, "guidance_order": "words"}
    plan = editor.recipe("a man", guidance_scale=3.0, **how, **told).plan
    expected = editor.decode(fastdiff.sample(guided, tuple(beside.shape), sampler=plan, seed=4))
    torch.testing.assert_close(editor("a man", guidance_scale=3.0, **how, **told), expected, rtol=1e-4, atol=1e-4)
    scales = lambda level: 3.0  # noqa: E731
    assert_same_bits(
        editor("a man", guidance_scale=3.0, **how, **told), editor("a man", guidance_scale=scales, **how, **told)
    )
    stacked = []
    hook = unet.register_forward_pre_hook(lambda module, args: stacked.append(len(args[0])))
    try:
        for scale in (3.0, 1.0):
            editor("a man", guidance_scale=scale, **how, **told)
    finally:
        hook.remove()
    assert stacked == [3] * 3 + [2] * 3
    with pytest.raises(ValueError, match="guidance_order is 'picture'; it must be one of image, words"):
        editor("a man", image=photo, guidance_order="picture")


def test_embeddings_of_ones_own_before_the_picture(editor, photo):
    """They stand for the words with the picture and without it."""
    own = prompts.keywords(editor.pipe, ["a man"], (64, 64), unconditional=False)
    told = {"image": photo, "steps": 2, "guidance_scale": 2.0, "image_guidance_scale": 3.0, "guidance_order": "words"}
    assert_same_bits(editor("", model_kwargs=own, **told), editor("a man", **told))


def test_tensors_in_a_list_have_their_size(pipe):
    small = torch.rand(3, 32, 48) * 2 - 1
    assert_same_bits(pipe("a man", image=[small], **FAST), pipe("a man", image=small, **FAST))


def test_two_threads_encode(pipe):
    """A tokenizer keeps how it was last asked to pad, and two calls ask for different things."""
    before, shapes = sys.getswitchinterval(), set()

    def work(_):
        prompts.warn_of_losses(pipe.pipe, ["a man"])
        shapes.add(tuple(prompts.encode(pipe.pipe, ["a man"])["a man"][0].shape))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(200)))
    finally:
        sys.setswitchinterval(before)
    assert shapes == {(1, pipe.pipe.tokenizer.model_max_length, pipe.pipe.text_encoder.config.hidden_size)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_that_is_moved_alone(folder, dtype):
    pipe = fastdiff.load(folder, device="cpu", accelerate=False)
    expected = pipe("a man", **FAST)
    pipe.pipe.unet.to(dtype)
    assert float((pipe("a man", **FAST) - expected).abs().mean()) < 0.02


def test_a_scheduler_that_is_exchanged(folder):
    """Its config says what the network predicts; accelerated or not."""
    from diffusers import DDIMScheduler

    for accelerate in (False, True):
        pipe = fastdiff.load(folder, device="cpu", accelerate=accelerate)
        before, images = dict(pipe.sampling), pipe("a man", **FAST)
        assert before["prediction"] == "v_prediction"
        pipe.pipe.scheduler = DDIMScheduler.from_config(pipe.pipe.scheduler.config, prediction_type="epsilon")
        assert pipe.sampling["prediction"] == "epsilon"
        assert_same_bits(pipe("a man", **FAST), pipe("a man", prediction="epsilon", **FAST))
        assert not torch.equal(pipe("a man", **FAST), images)


def test_accelerate_and_restore_of_the_pipeline_itself(folder):
    """fastdiff.accelerate and fastdiff.restore take it as its own methods do, and it knows."""
    pipe = fastdiff.load(folder, device="cpu", accelerate=False)
    plain, scheduler = pipe("a man", **FAST), pipe.pipe.scheduler
    assert pipe.report is None
    assert fastdiff.accelerate(pipe) is pipe.report
    pipe("a man", **FAST)
    fastdiff.restore(pipe)
    assert pipe.report is None
    assert pipe.pipe.scheduler is scheduler
    assert_same_bits(pipe("a man", **FAST), plain)
    pipe.accelerate()
    fastdiff.restore(pipe.pipe)
    assert pipe.report is None


def test_time_embeddings_are_planned_beside_a_picture(editor, photo, monkeypatch):
    from fastdiff.acceleration.network import Network

    calls = []
    real = Network.rows
    monkeypatch.setattr(Network, "rows", lambda self, times: calls.append(len(times)) or real(self, times))
    editor("make the skin dark", image=photo, steps=3)
    assert calls == [3]


def test_save(pipe, tmp_path):
    images = pipe(["a man", "a woman"], n=2, **FAST)
    assert pipe.save(images, tmp_path / "a.png") == tmp_path / "a.png"
    pipe.save(images, tmp_path / "b.png", labels=["a man", "a woman"])
    assert Image.open(tmp_path / "b.png").width > Image.open(tmp_path / "a.png").width - 64
    with pytest.raises(ValueError, match="4 images make no 3 rows"):
        pipe.save(images, tmp_path / "c.png", labels=["a", "b", "c"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pipe.save(images, tmp_path / "none" / "c.png", labels=["a", "b"])


def test_defaults_of_the_folder(folder, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    (mine / "sampling.json").write_text(json.dumps({"steps": 2, "guidance_scale": 3.0, "sampler": "ddim"}))
    pipe, steps = fastdiff.load(mine, device="cpu"), []
    drawn = pipe("a man", callback=lambda state: steps.append(1))
    assert len(steps) == 2
    assert_same_bits(drawn, pipe("a man", sampler="ddim", steps=2, guidance_scale=3.0))
    (mine / "sampling.json").write_text(json.dumps({"step": 2}))
    with pytest.raises(ValueError, match=r"sampling\.json has step; it may have sampler, steps"):
        fastdiff.load(mine, device="cpu")


def test_what_training_writes(tmp_path, seed):
    """The folders of ``fastdiff train``, of untrained networks."""
    from fastdiff.training.autoencoder import new_autoencoder
    from fastdiff.training.edits import widened
    from fastdiff.training.pipeline import SAMPLING, write_pipeline
    from fastdiff.training.text_to_image import new_unet
    from fastdiff.training.words import new_text_encoder, new_tokenizer

    tokenizer = new_tokenizer(["noto style woman firefighter medium-dark skin tone"], length=12, vocabulary=50)
    text, unet = new_text_encoder(tokenizer, width=32, layers=1), new_unet(8, (16, 32), 1, 4, 32)
    words, edits = tmp_path / "words", tmp_path / "edits"
    for folder, network, kind in (
        (words, unet, ""),
        (edits, widened(unet, 8), "StableDiffusionInstructPix2PixPipeline"),
    ):
        folder.mkdir()
        write_pipeline(folder, new_autoencoder(32, (8, 8, 16), 4), network, text, tokenizer, "v_prediction", kind=kind)
    pipe, editor = fastdiff.load(words, device="cpu"), fastdiff.load(edits, device="cpu")
    assert (pipe.size, pipe.factor, editor.edits) == (32, 4, True)
    assert pipe.defaults | SAMPLING == pipe.defaults
    images = pipe("Woman firefighter, medium-dark skin tone; noto style", steps=2)
    assert images.shape == (1, 3, 32, 32)
    with pytest.warns(UserWarning, match="does not know the word 'womman'; did you mean 'woman'"):
        editor("womman, noto style", image=images, steps=2)


def test_an_edit_folder_shares_its_parents_parts(folder, tmp_path):
    parent = tmp_path / "mine"
    shutil.copytree(folder, parent)
    random_pipeline.make(parent / "edit", in_channels=8, kind="StableDiffusionInstructPix2PixPipeline")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(parent / "edit" / part)
    pipe = fastdiff.load(parent / "edit", device="cpu")
    assert pipe.edits
    assert pipe("make the skin dark", image=torch.zeros(3, 64, 64), **FAST).shape == (1, 3, 64, 64)


# ---- bad input


def test_prompts_that_are_none(pipe):
    for wrong, message in ((3, "prompt must be a str, or several; got int"), ([], "at least one"),
                           (["a", None], r"prompt\[1\] must be a str; got NoneType")):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            pipe(wrong)
    with pytest.raises(ValueError, match="negative_prompt must be one, or 2, one a prompt; got 3"):
        pipe(["a", "a"], negative_prompt=["a"] * 3)
    with pytest.raises(ValueError, match="n must be"):
        pipe("a man", n=0)


def test_what_does_not_reach_the_network_is_said(pipe):
    long = " ".join(["a"] * 22 + ["red", "dragon"])
    with pytest.warns(UserWarning, match="has 26 tokens and the text encoder reads 24; what is cut: 'red dragon'"):
        pipe(long, **FAST)
    with pytest.warns(UserWarning, match="does not know") as said:
        pipe(["a womman", "a womman zzzz"], **FAST)
    assert [str(w.message) for w in said] == [
        "the model does not know the word 'womman'; did you mean 'woman'?", "the model does not know the word 'zzzz'",
    ]  # fmt: skip
    assert said[0].filename == __file__


def test_clips_vocabulary_spells_any_word():
    from transformers import CLIPTokenizer

    from fastdiff.text.single_file import vocabulary

    tokenizer = CLIPTokenizer(vocabulary([]), [], model_max_length=77)
    assert prompts._losses(tokenizer, "zzzz 日本") == []
    (note,) = prompts._losses(tokenizer, "a" * 75 + "bc")
    assert note.startswith("the prompt has 79 tokens and the text encoder reads 77; what is cut: 'bc'")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}, "image must be floating-point"),
        ({"image": torch.full((3, 64, 64), 255.0)}, r"image must lie in \[-1, 1\]; got \[255, 255\]"),
        ({"image": torch.full((3, 64, 64), float("nan"))}, "image must lie in"),
        ({"image": torch.zeros(1, 64, 64)}, r"image must be \[3, 64, 64\]"),
        ({"image": torch.zeros(3, 62, 64)}, "size must be a multiple of 4"),
        ({"image": torch.zeros(3, 64, 64), "size": 32}, r"image must be \[3, 32, 32\]"),
        ({"image": torch.zeros(3, 3, 64, 64)}, r"image must be one, 1 \(one a prompt\) or 1"),
        ({"image": 3}, "image must be a path, a Pillow image or a tensor; got int"),
        ({"image": "nowhere.png"}, "cannot read the picture nowhere.png"),
        ({"image": Image.new("F", (64, 64))}, "neither 8 nor 16 bits"),
        ({"mask": torch.ones(64, 64)}, "mask needs image"),
        ({"strength": 0.5}, "strength needs image"),
        ({"image": torch.zeros(3, 64, 64), "strength": 1.5}, "strength must be"),
        ({"image": []}, "image must hold at least one picture"),
        ({"image": torch.zeros(3, 64, 64), "mask": torch.ones(32, 32)}, r"mask must match the picture: \[64, 64\]"),
        ({"image": torch.zeros(3, 64, 64), "mask": torch.full((64, 64), 2.0)}, r"mask must lie in \[0, 1\]"),
        ({"image": torch.zeros(3, 64, 64), "mask": torch.ones(64, 64).int()}, "mask must be bool"),
        ({"size": 30}, "size must be a multiple of 4, the pixels of a latent; got 30×30"),
        ({"size": (64, 64, 3)}, "size must be a number of pixels"),
        ({"uncond_kwargs": {}}, "a pipeline sets uncond_kwargs itself"),
    ],
)
def test_pictures_that_are_none(pipe, told, message, monkeypatch):
    monkeypatch.setattr(prompts, "encode", lambda *a: pytest.fail("work was begun"))
    with pytest.raises((TypeError, ValueError), match=message):
        pipe("a man", **told)


def test_checkpoints_that_need_a_picture(editor, filler, photo):
    with pytest.raises(ValueError, match="image must be given: this checkpoint edits"):
        editor("make the skin dark")
    with pytest.raises(ValueError, match="image and mask must be given"):
        filler("a man", image=photo)


def test_sources_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="did you mean 'emoji'"):
        fastdiff.load("emojji")
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        fastdiff.load(tmp_path)
    with pytest.raises(TypeError, match="source must be a name"):
        fastdiff.load(3)
    with pytest.raises(ValueError, match="dtype must be"):
        fastdiff.load(tmp_path, dtype="float31")
    with pytest.raises(ValueError, match="tokenizer and config go with a file"):
        fastdiff.load(tmp_path, tokenizer=tmp_path)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs diffusers: pip install "fastdiff-torch\[text\]"'):
        fastdiff.load(tmp_path)


def test_a_folder_without_a_part(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / "vae")
    with pytest.raises(FileNotFoundError, match=r"lacks the folder vae, which its model_index\.json names"):
        fastdiff.load(tmp_path / "mine")


def test_another_pipeline_is_diffusers_own(tmp_path):
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                                 down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    pipe = fastdiff.load(tmp_path, device="cpu")
    assert type(pipe) is diffusers.DDPMPipeline
    assert type(pipe.scheduler).__module__.startswith("fastdiff")


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, fastdiff; fastdiff.load; print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
