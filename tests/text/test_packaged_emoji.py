"""The model in the package: diffusers and fastdiff load it, it knows its words, and draws what is asked for."""

import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import fastdiff  # noqa: E402
from fastdiff.evaluation.judge import Judge  # noqa: E402
from fastdiff.text.load import PACKAGED  # noqa: E402
from fastdiff.training.captioned import load_captioned, wordings  # noqa: E402

CELLS = 24
SHEET = Path(fastdiff.__file__).parents[1] / "data" / "emoji" / "sheet.webp"
in_a_clone = pytest.mark.skipif(not SHEET.exists(), reason="the emoji are in the repository alone")


@pytest.fixture(scope="module")
def pipe():
    return fastdiff.load("emoji", device="cpu")


def test_what_it_is(pipe):
    assert (pipe.size, pipe.factor, pipe.edits, pipe.fills) == (64, 4, False, False)
    assert pipe.sampling["prediction"] == "v_prediction"
    parts = (pipe.pipe.unet, pipe.pipe.vae, pipe.pipe.text_encoder)
    assert sum(p.numel() for part in parts for p in part.parameters()) < 12.5e6  # 25 MB in half precision
    files = [path for path in PACKAGED["emoji"].rglob("*") if path.is_file() and "edit" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 25e6


def test_the_editor_takes_what_it_shares_from_the_model_without_a_word(pipe, monkeypatch):
    said, listener = [], logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [listener])
    editor = fastdiff.load("emoji-edit", device="cpu")
    assert editor.edits
    assert all(torch.equal(a, b) for a, b in zip(pipe.pipe.vae.parameters(), editor.pipe.vae.parameters(), strict=True))
    assert said == []  # such as diffusers' advice to install accelerate


@in_a_clone
def test_it_knows_every_word_of_its_captions(pipe):
    data = load_captioned("emoji", part=None)
    tokenizer = pipe.pipe.tokenizer
    texts = [text for row in data.rows for text in wordings(row)]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    assert max(lengths) <= tokenizer.model_max_length
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(texts).input_ids)


@in_a_clone
@pytest.mark.slow
def test_it_draws_what_is_asked_for(pipe):
    """Of training cells, far more than by chance, which is 1 in 240, 6 and 4: the judge's shares, at fixed noise."""
    data = load_captioned("emoji", part=None, subset=None)
    chosen = torch.tensor([i for i, row in enumerate(data.rows) if row["part"] == "train"][: 5040 : 5040 // CELLS])[
        :CELLS
    ]
    images = pipe([data.captions[i][0] for i in chosen.tolist()], seed=0)
    means = Judge(data.rows, data.pixels).judge(images, chosen).means()
    assert means["subject"][0] > 0.5
    assert means["tone"][0] > 0.5
    assert means["style"][0] > 0.5


@pytest.mark.slow
def test_diffusers_draws_with_it(pipe):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(PACKAGED["emoji"], local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    prompt = "a woman firefighter, dark skin, noto style"
    images = theirs(prompt, num_inference_steps=10, guidance_scale=3.0, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)
    assert images.mean() > 0.4, "emoji stand on white"
