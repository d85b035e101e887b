"""``fastdiff sample`` with prompts and instructions."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import random_pipeline

import fastdiff
from fastdiff import cli


def run(*arguments):
    return CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_pipeline.make(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    kind = "StableDiffusionInstructPix2PixPipeline"
    return random_pipeline.make(tmp_path_factory.mktemp("edit") / "model", in_channels=8, kind=kind)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (80, 70), "teal").save(path)
    return path


def test_a_prompt(folder, tmp_path):
    out = tmp_path / "a.png"
    done = run(
        "sample", "a woman firefighter", "--model", folder, "--steps", 3, "--seed", 4, "--guidance", 2, "--out", out
    )
    assert done.exit_code == 0, done.output
    assert "a.png: 1 images of 64×64 pixels" in done.output
    pipe = fastdiff.load(folder, device="cpu", accelerate=False)
    images = pipe("a woman firefighter", steps=3, seed=4, guidance_scale=2.0)
    pipe.save(images, tmp_path / "b.png")
    assert Image.open(out).tobytes() == Image.open(tmp_path / "b.png").tobytes()
    assert fastdiff.read_recipe(out).words.prompts == ["a woman firefighter"]


def test_several_prompts_are_a_labelled_grid(folder, tmp_path):
    common = ("--model", folder, "--steps", 3, "--quiet", "--accelerate", "on")
    assert run("sample", "a woman", "a dragon", "-n", 3, "--out", tmp_path / "a.png", *common).exit_code == 0
    assert run("sample", "a woman", "-n", 3, "--out", tmp_path / "b.png", *common).exit_code == 0
    both, one = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert both.height == 2 * 65 - 1
    assert both.width > 3 * 65  # and the prompts beside
    assert one.size == (129, 129)


def test_batches_do_not_change_what_is_drawn(folder, tmp_path):
    common = ("sample", "a woman", "a dragon", "-n", 2, "--model", folder, "--steps", 3, "--quiet")
    for size in (1, 4):
        assert run(*common, "--batch-size", size, "--out", tmp_path / f"{size}.png").exit_code == 0
    pixels = [torch.tensor(list(Image.open(tmp_path / f"{size}.png").tobytes()), dtype=torch.int16) for size in (1, 4)]
    assert int((pixels[0] - pixels[1]).abs().max()) <= 1


def test_images_masks_instructions_and_films(folder, editor, photo, tmp_path):
    out = tmp_path / "a.png"
    common = ("--image", photo, "--steps", 4, "--out", out)
    for more in (("--strength", 0.5), ("--mask", photo), ("--mask", photo, "--strength", 0.5), ("--negative", "a man")):
        done = run("sample", "a woman", "--model", folder, *common, *more)
        assert done.exit_code == 0, done.output
    film = tmp_path / "a.gif"
    common += ("--image-guidance", 1.2, "--guidance-order", "words", "--model", editor, "--gif", film)
    done = run("sample", "--instruction", "make the skin dark", *common)
    assert done.exit_code == 0, done.output
    assert Image.open(film).n_frames == 4
    assert "reverse process in 4 frames" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--negative", "x"), "--negative needs a prompt"),
        (("--size", 8), "--size needs a prompt"),
        (("a man", "--class", "3"), "a prompt goes without --class"),
        (("a man", "--strength", 0.5), "--strength needs --image"),
        (("a man", "--instruction", "b"), "--instruction goes without prompts"),
        (("--instruction", "make the skin dark"), "--instruction needs a checkpoint that edits"),
        (("a man", "--image", "nowhere.png"), "cannot read the picture nowhere.png"),
        (("a man", "-n", 3, "--batch-size", 2, "--gif", "a.gif"), "--gif shows one batch"),
    ],
)
def test_what_is_asked_wrongly(folder, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("sample", *arguments, "--model", folder)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "samples.png").exists()


def test_words_that_the_model_lacks_are_told(folder, tmp_path):
    done = run("sample", "a womman", "--model", folder, "--steps", 2, "--out", tmp_path / "a.png")
    assert "warning: the model does not know the word 'womman'; did you mean 'woman'?" in done.output
