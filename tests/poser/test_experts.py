"""Local experts: the packaged emoji model by every kind that it has, and random pipelines of each sort."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import fastdiff
from fastdiff.poser.domain import Domain
from fastdiff.poser.experts import make_expert, make_experts
from fastdiff.poser.ledger import read_lines
from fastdiff.poser.poser import Poser
from fastdiff.poser.records import Spec, Step

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
from helpers import run
from random_pipeline import make

IN_A_CLONE = (Path(fastdiff.__file__).parents[1] / "data" / "emoji" / "sheet.webp").exists()
EMOJI = """
[critic]
kind = "emoji"
[rules]
attempts = 1
[hand]
subject = "draw"
tone = "sdedit"
style = "inpaint"
[[expert]]
name = "draw"
kind = "draw"
source = "emoji"
options = {steps = 3}
[[expert]]
name = "sdedit"
kind = "image-to-image"
source = "emoji"
given = "merged"
options = {steps = 4, strength = 0.5}
[[expert]]
name = "inpaint"
kind = "inpaint"
source = "emoji"
given = "merged"
box = [0.25, 0.0, 0.75, 1.0]
options = {steps = 3}
"""


SIMULATED = """
[critic]
kind = "simulated"
[[expert]]
name = "a"
kind = "simulated-draw"
options = {success = {subject = 1.0}}
"""


def expert(kind, source, **more):
    return make_expert(Spec(name="e", kind=kind, source=str(source), **more), Domain(), "cpu")


@pytest.mark.slow
@pytest.mark.skipif(not IN_A_CLONE, reason="the emoji are in the repository alone")
def test_the_packaged_emoji_model_end_to_end(tmp_path):
    """Drawing, SDEdit and inpainting, rated by the exact judge, through the command line; and again from the file."""
    (tmp_path / "experts.toml").write_text(EMOJI)
    request = "draw a pilot, then make the skin dark, then in flat style"
    asked = ("poser", "run", request, "--experts", tmp_path / "experts.toml", "--out", tmp_path / "out")
    first = run(*asked, "--device", "cpu")
    assert first.exit_code == 0, first.output
    steps = [line for line in read_lines(tmp_path / "out" / "run.jsonl") if isinstance(line, Step)]
    assert [step.expert for step in steps] == ["draw", "sdedit", "inpaint"]
    assert all(step.after and 0 <= step.critique.score <= 1 for step in steps)
    for step in steps:  # what the critic says is wrong is what it takes the picture for, in the domain's words
        assert step.critique.satisfied == (not step.critique.issues)
    again = run(*asked, "--device", "cpu")
    assert again.output.count("cost cached") == len(steps)
    assert run("poser", "replay", tmp_path / "out").exit_code == 0


@pytest.mark.slow
def test_each_kind_of_the_emoji_model():
    """Seeds are followed whatever is beside in the batch; an edit starts from its picture; a box bounds what changes.

    A model in float32 and one of the batch differ by rounding alone.
    """
    draw = expert("draw", "emoji", options={"steps": 3})
    images = draw.run(None, ["a pilot, dark skin", "a cook"], [5, 6])
    assert images.shape == (2, 3, 64, 64)
    assert (draw.run(None, ["a cook"], [6])[0] - images[1]).abs().max() < 1e-2
    assert (draw.run(None, ["a cook"], [7])[0] - images[1]).abs().max() > 0.1
    sdedit = expert("image-to-image", "emoji", options={"steps": 8, "strength": 0.25})
    edited = sdedit.run(images, ["a pilot, light skin", "a cook, dark skin"], [1, 2])
    near, far = ((edited - other).pow(2).mean() for other in (images, images.flip(0)))
    assert 0 < near < far
    inpaint = expert("inpaint", "emoji", box=(0.5, 0.0, 1.0, 1.0), options={"steps": 3})
    filled = inpaint.run(images, ["a cook", "a pilot"], [1, 2])
    kept, drawn = ((filled - images).abs()[:, :, part].mean() for part in (slice(0, 24), slice(40, 64)))
    assert kept < drawn


@pytest.mark.slow
def test_an_editor_by_instruction(tmp_path, seed):
    """fastdiff's own pipeline of a folder, given the pictures; what it is for must be what its kind says."""
    make(tmp_path / "edit", in_channels=8, kind="StableDiffusionInstructPix2PixPipeline")
    editor = expert("edit", tmp_path / "edit", options={"steps": 2})
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    edited = editor.run(images, ["make the dragon red", "make the dragon blue"], [1, 2])
    assert edited.shape == (2, 3, 64, 64)
    assert bool(edited.isfinite().all())
    other = editor.run(images.flip(0), ["make the dragon red", "make the dragon blue"], [1, 2])
    assert not torch.equal(edited, other)
    with pytest.raises(ValueError, match=r"kind of e is 'draw', but .* edits by instruction"):
        expert("draw", tmp_path / "edit")


@pytest.mark.slow
def test_any_pipeline_of_diffusers(tmp_path):
    """Random weights: what comes back follows the seeds and the words, and an editor's follows the picture."""
    draw = expert("diffusers", make(tmp_path / "draw"), size=32, options={"num_inference_steps": 2})
    images = draw.run(None, ["red dragon", "blue dragon"], [1, 2])
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < images.max() <= 1
    assert torch.equal(draw.run(None, ["red dragon", "blue dragon"], [1, 2]), images)
    assert not torch.equal(draw.run(None, ["red dragon", "blue dragon"], [3, 2])[0], images[0])
    folder = make(tmp_path / "edit", in_channels=8, kind="StableDiffusionInstructPix2PixPipeline")
    edit = expert("diffusers-edit", folder, size=64, options={"num_inference_steps": 2})
    given = torch.rand(2, 3, 64, 64) * 2 - 1
    edited = edit.run(given, ["make the dragon red"] * 2, [1, 1])
    assert edited.shape == (2, 3, 64, 64)
    assert not torch.equal(edited[0], edited[1])


@pytest.mark.slow
@pytest.mark.skipif(not IN_A_CLONE, reason="the emoji are in the repository alone")
def test_every_expert_of_the_packaged_file(tmp_path):
    """emoji.toml as it is: each expert is called once for each of two requests, and the exact judge rates it."""
    poser = Poser.of("emoji", folder=tmp_path, device="cpu")
    for action, name in enumerate(poser.names):
        episodes = [poser.begin(f"draw a {s}, then make the skin dark", i) for i, s in enumerate(("pilot", "cook"))]
        first = poser.names.index("draw-fast")
        steps = poser.step(episodes, [first] * 2)
        assert [step.text for step in steps] == ["a pilot", "a cook"]
        before = [episode.sha for episode in episodes]
        steps = poser.step(episodes, [action] * 2)
        assert [step.expert for step in steps] == [name] * 2
        assert all(step.after not in ("", sha) for step, sha in zip(steps, before, strict=True))
        merged = poser.experts[action].spec.given == "merged"
        done = [step.command != "draw a pilot" for step in steps]
        assert ("pilot" in steps[0].text) == (merged or not done[0]), name
    assert [len(each) for each in poser.verdict(episodes)] == [2, 2]


@pytest.mark.slow
def test_the_text_encoder_embeds_commands(tmp_path, seed):
    """It is the mean of its last hidden states, whatever is asked beside; a policy of other weights is refused."""
    from fastdiff.poser.embeddings import TextEncoder
    from fastdiff.poser.policy import About, Policy

    make(tmp_path / "model")
    texts = ["a red dragon", "", "blue"]
    embedding = TextEncoder(str(tmp_path / "model"), "cpu")
    pipe = fastdiff.load(tmp_path / "model", device="cpu", accelerate=False).pipe
    with torch.no_grad():
        states = pipe.text_encoder(pipe.tokenizer(texts[0], return_tensors="pt").input_ids).last_hidden_state[0]
    found = embedding(texts)
    assert found.shape == (3, embedding.size) == (3, pipe.text_encoder.config.hidden_size)
    assert torch.allclose(found[0], states.mean(0) / states.mean(0).norm(), atol=1e-6)
    assert torch.equal(found[1], torch.zeros(embedding.size))
    assert torch.equal(TextEncoder(str(tmp_path / "model"), "cpu")(texts[::-1]), found.flip(0))
    assert embedding([]).shape == (0, embedding.size)

    (tmp_path / "experts.toml").write_text(f"words = '{tmp_path / 'model'}'\n" + SIMULATED)
    process = Poser.of(tmp_path / "experts.toml", device="cpu")
    assert process.embedding.name == embedding.name
    assert process.observe([process.begin("red")]).shape == (1, 2 * embedding.size)
    Policy([process.width, 4, 1], About(("a",), embedding.name, False)).check(process)
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).add_(1)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"the policy observes paper's states of .*model:[0-9a-f]{16}; here they are"):
        Policy([process.width, 4, 1], About(("a",), embedding.name, False)).check(
            Poser.of(tmp_path / "experts.toml", device="cpu")
        )


@pytest.mark.slow
def test_a_text_model_of_a_folder_embeds_commands(tmp_path, seed):
    """The mean over tokens, as sentence-transformers has it for MiniLM."""
    import transformers
    from random_pipeline import word_tokenizer

    from fastdiff.poser.embeddings import TextEncoder

    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, intermediate_size=16)  # fmt: skip
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        states = model(tokenizer("make the dragon red", return_tensors="pt").input_ids).last_hidden_state[0]
    found = TextEncoder(str(tmp_path), "cpu")(["make the dragon red", " "])
    assert torch.allclose(found[0], states.mean(0) / states.mean(0).norm(), atol=1e-6)
    assert not found[1].any()


@pytest.mark.slow
def test_a_kind_that_the_model_is_not_of():
    with pytest.raises(ValueError, match="kind of e is 'edit', but emoji draws from captions"):
        expert("edit", "emoji")
    with pytest.raises(ValueError, match=r"box of e must be \(top, left, bottom, right\) in \[0, 1\]"):
        expert("inpaint", "emoji", box=(0.5, 0.0, 0.5, 1.0))


def test_an_expert_whose_model_is_missing_is_left_out_where_that_is_said(monkeypatch):
    """The rule of the file is then followed by whom it names next."""
    from fastdiff.poser.run import hand_rule
    from fastdiff.text import load as loading

    monkeypatch.setitem(loading.PACKAGED, "emoji-edit", Path("nowhere"))
    spec = {"name": "x", "kind": "edit", "source": "emoji-edit"}
    with pytest.raises(
        FileNotFoundError, match=r"source of x: there is no file and no folder nowhere; this installation"
    ):
        make_experts([Spec(**spec)], Domain(), "cpu")
    with pytest.warns(UserWarning, match="left out: x, y: there is no file and no folder nowhere"):
        assert make_experts([Spec(**{**spec, "name": n}, optional=True) for n in "xy"], Domain(), "cpu") == []
    process = Poser.of()
    rule = hand_rule(process, {"subject": "slow", "tone": ["nobody", "tone"], "style": ["nobody"]})
    assert rule.kinds == {"subject": process.names.index("slow"), "tone": process.names.index("tone")}
    assert hand_rule(process, {"tone": "nobody"}) is None


def test_refusals():
    with pytest.raises(ValueError, match="kind of e is 'drow'; did you mean 'draw'"):
        expert("drow", "emoji")
    with pytest.raises(ValueError, match="source of e must be given"):
        expert("draw", "")
