"""Pictures from words, trained: the folder is diffusers' own, a run that is resumed has the same bits, and edits."""

import json
import math
import random

import pytest
import torch

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import numpy as np  # noqa: E402
from helpers import run  # noqa: E402
from PIL import Image  # noqa: E402

from fastdiff.training import edits, pipeline, words  # noqa: E402
from fastdiff.training.text_to_image import Latents, Reader, TextRun, new_unet  # noqa: E402

TONES = ("", "light", "dark")
SMALL = {
    "steps": 4, "autoencoder_steps": 2, "batch_size": 4, "autoencoder_batch_size": 2, "channels": (16, 32),
    "autoencoder_channels": (16, 16, 16), "text_width": 32, "text_layers": 1, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _small_grids():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.training.pipeline._SHOWN", 2)
        patch.setattr("fastdiff.training.text_to_image._SHOWN", 1)
        yield


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """A sheet of two styles, two subjects and three tones."""
    folder = tmp_path_factory.mktemp("emoji")
    rows = [
        {"style": style, "subject": subject, "tone": tone, "subset": "emoji-240", "part": "train"}
        for style in ("noto", "flat") for subject in ("cook", "pilot") for tone in TONES
    ]  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (2 * 64, 6 * 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "sheet.webp", lossless=True)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(emoji, tmp_path_factory):
    return pipeline.train_pipeline(emoji, tmp_path_factory.mktemp("run") / "model", **SMALL)


def weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {**{f"model.{k}": v for k, v in state["model"].items()}, **{f"ema.{k}": v for k, v in state["ema"].items()}}


def test_diffusers_runs_the_folder(trained):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(trained, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a cook, dark skin, noto style", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()
    index = json.loads((trained / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    latents = pipe.vae.encode(torch.rand(2, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (2, 4, 16, 16)
    assert (trained / "samples" / "step-000004.png").exists()
    assert (trained / "autoencoder" / "samples" / "step-000002.png").exists()
    record = json.loads((trained / "training.json").read_text())
    assert record["settings"]["prediction"] == pipe.scheduler.config.prediction_type == "v_prediction"
    assert record["scaling_factor"] == pipe.vae.config.scaling_factor


def test_latents_have_unit_variance(trained, emoji):
    from fastdiff.training.autoencoder import encoded
    from fastdiff.training.captioned import load_captioned

    vae = diffusers.AutoencoderKL.from_pretrained(trained, subfolder="vae", local_files_only=True)
    latents = encoded(vae, load_captioned(emoji)) * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "unet"])
def test_a_run_that_is_interrupted_goes_on_to_the_same_bits(emoji, trained, tmp_path, monkeypatch, stage):
    kind = pipeline.AutoencoderRun if stage == "autoencoder" else pipeline.TextRun
    step = kind.train_step

    def stops(self):
        if self.step == 1:
            raise RuntimeError("killed")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "train_step", stops)
        with pytest.raises(RuntimeError, match="killed"):
            pipeline.train_pipeline(emoji, tmp_path / "model", **SMALL | {"save_every": 1})
    pipeline.train_pipeline(emoji, tmp_path / "model", resume=True, **SMALL)
    whole, resumed = weights(trained), weights(tmp_path / "model")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_folder_that_is_in_use_is_refused(trained, emoji, tmp_path):
    with pytest.raises(FileExistsError, match="checkpoint"):
        pipeline.train_pipeline(emoji, trained, **SMALL)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        pipeline.train_pipeline(emoji, tmp_path / "none", resume=True, **SMALL)
    with pytest.raises(ValueError, match="other settings: channels"):
        pipeline.train_pipeline(emoji, trained, resume=True, **SMALL | {"channels": (16, 48)})


def test_a_trained_pipeline_is_gone_on_from_with_other_words(trained, tmp_path):
    """A few steps from its weights, with a tiny rate: the same autoencoder, nearly the same UNet, and more words."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = [{"file_name": f"{i}.png", "text": "a purple unicorn"} for i in range(3)]
    for line in lines:
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            folder / line["file_name"]
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    few = {"steps": 2, "batch_size": 2, "lr": 1e-9, "progress": False}
    out = pipeline.train_pipeline(folder, tmp_path / "more", init=str(trained), **few)
    before, after = (
        diffusers.StableDiffusionPipeline.from_pretrained(place, local_files_only=True) for place in (trained, out)
    )
    for name, value in before.vae.state_dict().items():
        assert torch.equal(value, after.vae.state_dict()[name]), name
    for name, value in before.unet.state_dict().items():
        torch.testing.assert_close(after.unet.state_dict()[name], value, rtol=0, atol=1e-6)
    assert {"purple", "unicorn"} <= set(after.tokenizer.get_vocab()) - set(before.tokenizer.get_vocab())
    assert not (out / "autoencoder").exists()
    with pytest.raises(ValueError, match="it cannot be init"):
        pipeline.train_pipeline(folder, tmp_path / "other", init=str(trained), prediction="epsilon", **few)
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        pipeline.train_pipeline(folder, tmp_path / "other", init=str(folder), **few)


def test_a_decoder_is_trained_alone(trained, emoji, tmp_path):
    """Its latents are those that the UNet knows; where the first stage was killed, the run goes on there."""
    few = {"steps": 1, "decoder_steps": 2, "batch_size": 2, "autoencoder_batch_size": 2, "progress": False}
    out = pipeline.train_pipeline(emoji, tmp_path / "more", init=str(trained), **few)
    before, after = (torch_state(place / "vae") for place in (trained, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(("decoder", "post_quant"))}
    assert (out / "autoencoder" / "quality.json").exists()
    (out / "checkpoint.pt").unlink()
    pipeline.train_pipeline(emoji, out, init=str(trained), resume=True, **few)
    for name, value in torch_state(out / "vae").items():
        assert torch.equal(value, after[name]), name
    with pytest.raises(ValueError, match="decoder_steps is 2, which goes with init"):
        pipeline.train_pipeline(emoji, tmp_path / "none", **few)


def torch_state(folder):
    return diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True).state_dict()


# ---- the target


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_what_is_learnt(prediction, seed, rng):
    """The target of a latent and its noise gives that latent back, by the definition of each prediction."""
    schedule = pipeline.noise_schedule()
    run = object.__new__(TextRun)
    run.schedule, run.settings = schedule, pipeline.TextSettings("emoji", prediction=prediction)
    run.generator, run.step, run.device = torch.Generator().manual_seed(rng.getrandbits(32)), 3, torch.device("cpu")
    x = torch.randn(3, 4, 2, 2)
    noised, t, target = run.noised(x)
    alpha, sigma = (table.double()[t].view(-1, 1, 1, 1) for table in (schedule.alphas, schedule.sigmas))
    back = {
        "epsilon": (noised - sigma * target) / alpha,
        "sample": target,
        "v_prediction": alpha * noised - sigma * target,
    }
    close = 1e-4 if prediction != "epsilon" else 1e-4 / alpha.min().item()  # which divides by it
    torch.testing.assert_close(back[prediction].float(), x, rtol=close, atol=close)


# ---- words


def test_words_and_what_is_no_word():
    tokenizer = words.new_tokenizer(
        ["Noto style cook medium-dark skin tone", "a pilot, flat"], length=8, vocabulary=100
    )
    ids = words.tokens_of(tokenizer, ["a NOTO pilot, medium-dark skin!", "", "a unicorn"])
    assert ids.shape == (3, 8)
    text = [tokenizer.convert_ids_to_tokens(row) for row in ids]
    assert text[0] == ["<begin>", "a", "noto", "pilot", "medium-dark", "skin", "<end>", "<pad>"]
    assert text[1] == ["<begin>", "<end>"] + ["<pad>"] * 6
    assert text[2][2] == "<unknown>"
    assert len(words.tokens_of(tokenizer, ["a " * 50])[0]) == 8


def test_more_words_leave_the_others_what_they_are(seed):
    tokenizer = words.new_tokenizer(["a cook"], length=8, vocabulary=100)
    encoder = words.new_text_encoder(tokenizer, width=32, layers=1).eval()
    more, grown = edits.with_words(tokenizer, encoder, ["make the cook dark"])
    assert len(more) == len(tokenizer) + 3
    assert len(more) == grown.config.vocab_size
    ids = words.tokens_of(tokenizer, ["a cook"])
    assert torch.equal(ids, words.tokens_of(more, ["a cook"]))
    assert torch.equal(encoder(ids)[0], grown.eval()(ids)[0])
    assert more.unk_token_id not in words.tokens_of(more, ["make the cook dark"])


# ---- edits


def table(missing=()):
    rows = [{"subject": s, "style": y, "tone": t} for s in "abc" for y in "xy" for t in ("", "light", "dark")]
    return [row for i, row in enumerate(rows) if i not in missing]


def test_pairs_differ_as_the_instruction_says(rng):
    rows = table(missing=rng.sample(range(18), 3))
    pairs, generator = edits.Pairs(rows), torch.Generator().manual_seed(rng.getrandbits(32))
    assert all(
        [pairs.values[name][i] for name, i in zip(edits.FACTORS, labels, strict=True)] == [r[n] for n in edits.FACTORS]
        for r, labels in zip(rows, pairs.labels.tolist(), strict=True)
    )
    kinds = []
    for _ in range(300):
        source = rng.randrange(len(rows))
        target, wording = pairs.draw(source, generator)
        changed = [name for name in edits.FACTORS if rows[source][name] != rows[target][name]]
        kinds.append(tuple(changed))
        asked = {order for n in (changed, changed[::-1]) for order in edits.instructions(rows[target], n)}
        assert wording in asked
    assert set(kinds) == set(edits.KINDS)


def test_a_wider_unet_begins_as_the_narrow_one(seed):
    unet = new_unet(8, (16, 32), 1, 4, 32).eval()
    wide = edits.widened(unet, 8).eval()
    x, more, words_ = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    one = unet(x, torch.tensor(7), words_).sample
    torch.testing.assert_close(wide(torch.cat([x, more], 1), torch.tensor(7), words_).sample, one)


def test_an_editor(trained, emoji, tmp_path):
    out = pipeline.train_editor(emoji, tmp_path / "edit", init=str(trained), steps=2, batch_size=4, progress=False)
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(out, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.in_channels == 8
    for config in out.rglob("*.json"):
        if config.name != "training.json":  # a record of the command, which names what it started from
            assert str(tmp_path.parent) not in config.read_text(), config
    images = pipe("make the skin dark", image=torch.rand(1, 3, 64, 64), num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)
    ids = words.tokens_of(pipe.tokenizer, ["make the skin yellow and a cook instead"])
    assert pipe.tokenizer.unk_token_id not in ids

    more = pipeline.train_editor(
        emoji, tmp_path / "more", init=str(out), steps=1, lr=1e-30, batch_size=4, progress=False
    )
    again = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(more, local_files_only=True)
    for weight, went_on in zip(pipe.unet.parameters(), again.unet.parameters(), strict=True):
        torch.testing.assert_close(went_on, weight)
    with pytest.raises(ValueError, match="takes 8 channels: it cannot be init"):
        pipeline.train_pipeline(emoji, tmp_path / "words", init=str(out), steps=1, progress=False)


def test_conditions_are_dropped_as_the_paper_says(emoji, seed):
    """5% without the picture, 5% without words, 5% without both: of 4,000, within five deviations."""
    values = torch.ones(12, 4, 2, 2)
    rows = [json.loads(line) for line in (emoji / "captions.jsonl").read_text().splitlines()]
    run = object.__new__(edits.EditRun)
    run.pairs, run.generator = edits.Pairs(rows), torch.Generator().manual_seed(random.getrandbits(32))
    run.read, run.empty = lambda texts: torch.ones(len(texts), 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    none = torch.zeros(12, dtype=torch.int64)
    run.data, run.scale, run.device = Latents(values, none[:1].view(1, 1), none, none, ""), 0.5, torch.device("cpu")
    index = torch.randint(12, (4000,))
    run.batches = iter([(values[index], index)])
    _, tokens, pictures = run.examples()
    picture, text = pictures[:, 0, 0, 0] == 0, tokens[:, 0] == 0
    assert set(pictures.unique().tolist()) == {0.0, 2.0}  # not scaled
    for count in (picture & ~text, text & ~picture, picture & text):
        assert abs(count.sum().item() - 200) < 5 * (4000 * 0.05 * 0.95) ** 0.5
    assert torch.equal((run.wanted < 0).all(1), picture | text)  # where something is missing nothing is asked
    assert torch.equal((run.wanted < 0).any(1), picture | text)


def test_half_of_an_editors_examples_are_noisier(seed):
    run = object.__new__(edits.EditRun)
    run.schedule, run.generator = pipeline.noise_schedule(), torch.Generator().manual_seed(random.getrandbits(32))
    drawn = run.timesteps(4000)
    assert drawn.dtype == torch.int64
    assert set(drawn.div(250, rounding_mode="floor").unique().tolist()) == {0, 1, 2, 3}
    assert abs((drawn >= 500).sum().item() - 3000) < 5 * (4000 * 0.75 * 0.25) ** 0.5


def test_probes_ask_the_blocks_and_reach_what_reads_the_picture(seed):
    tokenizer = words.new_tokenizer(["a cook"], length=8, vocabulary=100)
    encoder = words.new_text_encoder(tokenizer, width=32, layers=1)
    values = {"subject": list("abc"), "style": list("xy"), "tone": ["", "light", "dark", "medium"]}
    reader = edits.ProbedReader(edits.widened(new_unet(8, (16, 32), 1, 4, 32), 8), encoder, values)
    pictures = torch.randn(3, 8, 8, 8, requires_grad=True)
    labels = torch.tensor([[0, 1, 3], [-1, -1, -1], [2, 0, 1]])

    def asked():
        with reader.kept() as outputs:
            reader(pictures, torch.tensor([3, 500, 900]), words.tokens_of(tokenizer, ["a cook"] * 3))
        return reader.told(outputs, labels)

    loss = asked()
    torch.testing.assert_close(loss.item(), sum(math.log(len(v)) for v in values.values()) / 3)  # they know nothing yet
    loss.backward()
    with torch.no_grad():
        for weight in reader.probes.parameters():
            weight -= 0.1 * weight.grad
    learnt = asked()
    assert learnt < loss
    pictures.grad = None
    learnt.backward()
    assert [bool(gradient.any()) for gradient in pictures.grad] == [True, False, True]
    assert reader.told([torch.randn(3, 32, 4, 4)] * 2, torch.full((3, 3), -1)) == 0  # all were dropped
    assert not any(block._forward_hooks for block in reader.probed())
    assert not any("probe" in name for name in reader.unet.state_dict())


def test_the_reader_hands_words_to_the_unet(seed):
    tokenizer = words.new_tokenizer(["a cook"], length=8, vocabulary=100)
    reader = Reader(new_unet(8, (16, 32), 1, 4, 32), words.new_text_encoder(tokenizer, width=32, layers=1)).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    one, other = (reader(x, t, words.tokens_of(tokenizer, [text] * 2)) for text in ("a cook", "cook a"))
    assert one.shape == x.shape
    assert not torch.equal(one, other)


# ---- the command


def command(data, out, *more):
    few = ("--steps", 2, "--autoencoder-steps", 1, "--batch-size", 2, "--channels", "16,32", "--quiet", "--threads", 1)
    return run("train", "--data", data, "--out", out, *few, *more)


@pytest.mark.slow
def test_the_command_trains_on_captions_and_then_an_editor(emoji, tmp_path):
    made = command(emoji, tmp_path / "model")
    assert made.exit_code == 0, made.output
    edited = run("train", "--data", emoji, "--edits", "--init", tmp_path / "model", "--out", tmp_path / "editor",
                 "--steps", 2, "--batch-size", 2)  # fmt: skip
    assert edited.exit_code == 0, edited.output
    assert "draw from it with  fastdiff sample" in edited.output
    assert 'fastdiff sample --instruction "what to change" --image PICTURE --model' in edited.output
    assert (tmp_path / "editor" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sampler", "ddim"), "--sampler is not for"),
        (("--edits",), "--edits needs --init"),
        (("--channels", "20,32"), "channels=(20, 32) is not supported"),
        (("--size", 60), "size=60 is not supported"),
        (("--schedule", "cosine"), "schedule='cosine' is not supported"),
    ],
)
def test_what_the_command_refuses(emoji, tmp_path, more, message):
    refused = command(emoji, tmp_path / "model", *more)
    assert refused.exit_code == 2
    assert message in " ".join(refused.output.split())
    assert not (tmp_path / "model").exists()
