"""Sets of pictures from words: each prompt's picture, what the shards say of it, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).resolve().parents[1] / "text"))
import random_pipeline

import fastdiff
from fastdiff.generation.job import Folder
from fastdiff.generation.verify import verify
from fastdiff.pictures.grid import to_uint8
from fastdiff.text import prompts as encoding

PROMPTS = ["a woman", "a red pilot", "a woman", "a blue dragon", "a man"]
SMALL = {"steps": 1, "shard_size": 4, "batch_size": 2, "guidance_scale": 2.0, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_pipeline.make(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture(scope="module")
def pipe(folder):
    return fastdiff.load(folder, device="cpu", accelerate=False)


def images_of(place):
    place = Folder(place)
    job = place.read()
    return [image for shard in range(job.shards) for image in place.images(job, shard)]


@pytest.mark.parametrize("format", ["tar", "png", "npz"])
def test_each_prompt_is_an_image(tmp_path, folder, pipe, format):
    asked = {**SMALL, "negative_prompt": "a firefighter", "seed": 3, "sampler": "ddim"}
    made = fastdiff.generate(folder, None, tmp_path / "set", prompts=PROMPTS, format=format, **asked)
    assert (made.num, made.made, made.failed) == (5, 5, {})
    found = images_of(tmp_path / "set")
    assert [record["prompt"] for record, _ in found] == PROMPTS
    for begin in range(0, 5, 2):
        told = {"negative_prompt": "a firefighter", "seed": 3, "steps": 1, "guidance_scale": 2.0, "sampler": "ddim"}
        images = pipe(PROMPTS[begin : begin + 2], sample_offset=begin, **told)
        for i, pixels in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy(), begin):
            np.testing.assert_array_equal(found[i][1], pixels)
    lines = [json.loads(line) for line in (tmp_path / "set" / "manifest.jsonl").read_text().splitlines()]
    assert [line.get("prompts") for line in lines] == [PROMPTS[:4], PROMPTS[4:], None]
    assert verify(tmp_path / "set", remake=3, device="cpu").right


def test_a_picture_says_its_prompt_and_is_made_again(tmp_path, folder):
    prompts = ["a woman", "a dragon, 竜"]
    with pytest.warns(UserWarning, match="does not know the word"):
        fastdiff.generate(folder, 2, tmp_path / "set", prompts=prompts, format="png", **SMALL)
    for i, prompt in enumerate(prompts):
        path = tmp_path / "set" / "shard-000000" / f"{i:06d}.png"
        assert Image.open(path).info["prompt"] == prompt
        assert fastdiff.reproduce(path).same_bits
    bare = tmp_path / "bare"
    with pytest.warns(UserWarning, match="does not know the word"):
        fastdiff.generate(folder, 2, bare, prompts=prompts, format="png", recipes=False, **SMALL)
    assert Image.open(bare / "shard-000000" / "000001.png").info["prompt"] == prompts[1]


def test_the_same_command_goes_on(tmp_path, folder, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    asked = ["generate", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "set", "--model", folder,
             "--steps", 1, "--shard-size", 2, "--batch-size", 2, "--size", 32, "--negative", "a man",
             "--device", "cpu"]  # fmt: skip
    done = run(*asked)
    assert done.exit_code == 0, done.output
    assert "5 images, sha256" in done.output
    before = verify(tmp_path / "set").sha256
    (tmp_path / "set" / "shard-000001.tar").unlink()
    assert run(*asked).exit_code == 0
    assert verify(tmp_path / "set").sha256 == before
    assert images_of(tmp_path / "set")[0][1].shape == (32, 32, 3)
    for changed, told in (
        (("--negative", "a woman"), "negative_prompt"),
        (("--size", 64), "image shape"),
        (("--num", 4), "num"),
    ):
        refused = run(*asked, *changed)
        assert refused.exit_code == 2
        assert f"another job: {told}" in refused.output.replace("num 5 (now 4), prompts", "num")
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:4], "a pilot"]))
    refused = run(*asked)
    assert refused.exit_code == 2
    assert "another job: prompts 5, sha256" in refused.output


def test_a_prompt_is_encoded_once_a_batch(tmp_path, pipe, monkeypatch):
    texts, original = [], encoding.encode
    monkeypatch.setattr(encoding, "encode", lambda pipe, given: texts.append(list(given)) or original(pipe, given))
    calls = []
    hook = pipe.pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        prompts = ["a woman"] * 3 + ["a man"]
        fastdiff.generate(pipe, None, tmp_path / "set", prompts=prompts, **{**SMALL, "batch_size": 4})
    finally:
        hook.remove()
    first, batch = 2, 3  # of image 0 prompt and empty prompt; of the batch two prompts and the empty one
    assert len(calls) == first + batch


def test_an_accelerated_pipeline(tmp_path, folder, pipe):
    fastdiff.generate(folder, 2, tmp_path / "set", prompts=PROMPTS, accelerate=True, format="png", **SMALL)
    assert Folder(tmp_path / "set").read().images.network.accelerated is not None
    assert fastdiff.reproduce(tmp_path / "set" / "shard-000000" / "000001.png").same_bits
    fastdiff.generate(pipe, 2, tmp_path / "other", prompts=PROMPTS, accelerate=True, **SMALL)
    assert pipe.report is None  # taken out again


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"prompts": "empty"}, "empty, line 2 is empty"),
        ({"prompts": "none"}, "none has no prompts"),
        ({"prompts": "binary"}, "binary is no text in UTF-8"),
        ({"prompts": "missing"}, "missing"),
        ({"prompts": ["a", "b"], "num": 3}, "prompts has 2 prompts, and num is 3"),
        ({"prompts": "two", "num": 3}, "two has 2 prompts, and num is 3"),
        ({"prompts": ["a", " "]}, r"prompts\[1\] is empty"),
        ({"prompts": ["a", 7]}, r"prompts\[1\] must be a str; got int"),
        ({"prompts": ["\ud800"]}, r"prompts\[0\] is no Unicode text"),
        ({"prompts": 7}, "prompts must be a file, or a list of str; got int"),
        ({"prompts": ["a"], "labels": "balanced"}, "labels and prompts exclude each other"),
        ({"prompts": ["a"], "size": 33}, "size must be a multiple of 4"),
        ({"prompts": ["a"], "negative_prompt": 5}, "negative_prompt must be a str"),
        ({"prompts": ["a"], "image": "photo.png"}, "image is no argument of generate"),
        ({"prompts": ["a"], "model": None, "num": 0}, "num must be in"),
        ({"prompts": ["a"], "model": fastdiff.models.digits()}, "prompts need a model that draws from words"),
        ({"prompts": ["a"], "model": "digits"}, "prompts need a pipeline of words; digits has no model_index.json"),
        ({"prompts": ["a"], "model": 7}, "model must be a folder"),
        ({"num": 3, "model": None, "size": 8}, "size goes with prompts"),
        ({"num": 3, "model": None, "negative_prompt": "a"}, "negative_prompt goes with prompts"),
        ({"num": 3, "model": "emoji"}, "prompts must be given: this model draws from words"),
        ({"model": None}, "num must be given"),
    ],
)
def test_what_is_refused_before_any_work(tmp_path, monkeypatch, folder, wrong, told):
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("a woman\n \na man\n")
    Path("none").write_text("")
    Path("binary").write_bytes(b"\xff\xfe\xfa")
    Path("two").write_text("a woman\na man\n")
    Path("digits").mkdir()
    asked = {"model": folder, "num": None, **SMALL, **wrong}
    model, num = asked.pop("model"), asked.pop("num")
    with pytest.raises((ValueError, TypeError, OSError), match=told):
        fastdiff.generate(model, num, "set", **asked)
    assert not Path("set").exists()


def test_a_pipeline_without_prompts_or_of_another_dtype(tmp_path, pipe):
    with pytest.raises(ValueError, match="prompts must be given"):
        fastdiff.generate(pipe, 3, tmp_path / "set")
    with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16, and the pipeline's torch\.float32"):
        fastdiff.generate(pipe, None, tmp_path / "set", prompts=["a woman"], dtype=torch.bfloat16)


def test_a_file_may_have_a_mark_and_spaces(tmp_path):
    from fastdiff.generation.prompts import Prompts

    (tmp_path / "a").write_bytes("\ufeff a woman \r\na man".encode())
    given = Prompts(tmp_path / "a", None)
    assert given.of(range(2)) == ["a woman", "a man"]
    assert Prompts(["a woman", "a man", "more"], 2).told == given.told
    assert Prompts(["a woman", "a  man"], 2).told != given.told
