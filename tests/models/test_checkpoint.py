"""Checkpoint folders: both ways with diffusers, old names, damage, and saves that are cut short."""

import json
import os
import pickle
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fastdiff
from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule, models
from fastdiff.models import UNet

CONFIG, SAFETENSORS, PICKLE = "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "attention_head_dim": None,
    "num_train_timesteps": 1000,
}


@pytest.fixture(autouse=True)
def rng(rng: random.Random) -> random.Random:
    """The run's seed, for every test here."""
    return rng


@pytest.fixture
def model() -> UNet:
    return UNet(**SMALL).eval()


@pytest.fixture
def folder(model: UNet, tmp_path: Path) -> Path:
    """Where `model` is saved."""
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def edit_weights(folder: Path, change) -> None:
    state = safetensors.torch.load_file(folder / SAFETENSORS)
    change(state)
    safetensors.torch.save_file(state, folder / SAFETENSORS)


@torch.no_grad()
def assert_same(ours: UNet, theirs, labels=None) -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.randint(1000, [2])
    torch.testing.assert_close(ours(x, t, labels), theirs(x, t, labels).sample, rtol=0, atol=1e-5)


def assert_equal_weights(got: UNet, expected: UNet) -> None:
    assert got.config == expected.config
    state = got.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("safe", [True, False])
def test_loads_what_diffusers_saves(diffusers, tmp_path, safe):
    theirs = diffusers.UNet2DModel(**SMALL).eval()
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    ours = UNet.from_pretrained(str(tmp_path))
    assert not ours.training
    assert ours.config.attention_head_dim is None
    assert ours.config.num_train_timesteps == 1000
    assert_same(ours, theirs)


def test_loads_the_unet_of_a_pipeline(diffusers, tmp_path):
    theirs = diffusers.UNet2DModel(**SMALL).eval()
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG).exists()
    assert_same(UNet.from_pretrained(tmp_path), theirs)


def test_diffusers_loads_what_we_save(diffusers, model, folder):
    theirs, unread = diffusers.UNet2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(unread.values())
    expected = diffusers.UNet2DModel(**SMALL).config
    got = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    assert json.dumps(got) == json.dumps({name: expected[name] for name in got})
    assert_same(model, theirs.eval())


def test_null_class_survives_and_diffusers_still_loads(diffusers, tmp_path):
    ours = UNet(**SMALL, num_class_embeds=11, null_class=10).eval()
    ours.save_pretrained(tmp_path)
    assert_equal_weights(UNet.from_pretrained(tmp_path), ours)
    assert UNet.from_pretrained(tmp_path).null_class == 10
    assert_same(ours, diffusers.UNet2DModel.from_pretrained(tmp_path).eval(), torch.randint(11, [2]))


def test_old_attention_names(diffusers, model, folder):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = safetensors.torch.load_file(folder / SAFETENSORS)
    for new, name in old.items():
        state = {key.replace(new, name): tensor for key, tensor in state.items()}
    assert "mid_block.attentions.0.proj_attn.weight" in state
    (folder / SAFETENSORS).unlink()
    torch.save(state, folder / PICKLE)
    assert_equal_weights(UNet.from_pretrained(folder), model)
    assert_same(UNet.from_pretrained(folder), diffusers.UNet2DModel.from_pretrained(folder).eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_keeps_the_dtype(model, tmp_path, dtype):
    model = model.to(dtype).to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path / "a" / "b")
    assert_equal_weights(UNet.from_pretrained(tmp_path / "a" / "b"), model)


def test_a_loaded_model_trains_and_saves_over_its_own_folder(folder):
    model = UNet.from_pretrained(folder).train()
    model(torch.randn(2, 3, 8, 8), 5).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(folder)
    assert_equal_weights(UNet.from_pretrained(folder), model)


def test_inert_fields_survive(model, folder):
    edit_config(folder, sample_size=[8, 16], num_train_timesteps=77, _diffusers_version="0.0.4", _name_or_path="x")
    loaded = UNet.from_pretrained(folder)
    loaded.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    assert (config["sample_size"], config["num_train_timesteps"]) == ([8, 16], 77)
    assert config["_class_name"] == "UNet2DModel"


def test_fields_left_out_mean_diffusers_defaults(diffusers):
    with torch.device("meta"):
        ours, theirs = UNet().config.to_dict(), diffusers.UNet2DModel().config
    assert ours == {name: theirs[name] for name in ours}
    assert set(ours) == {name for name in theirs if not name.startswith("_")}


@pytest.mark.parametrize("name", [SAFETENSORS, PICKLE])
@pytest.mark.parametrize("kept", [0.0, 1e-5, 0.3, 0.999, None], ids=str)
def test_truncated_weights(model, folder, rng, name, kept):
    if name == PICKLE:
        (folder / SAFETENSORS).unlink()
        torch.save(model.state_dict(), folder / PICKLE)
    data = (folder / name).read_bytes()
    size = rng.randrange(len(data)) if kept is None else int(kept * len(data))
    print(f"{size} of {len(data)} bytes")
    (folder / name).write_bytes(data[:size])
    with pytest.raises(ValueError, match=name):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html>", pickle.dumps([1, 2], protocol=2), pickle.dumps({"weights": 1}, protocol=2)],
    ids=["html", "list", "numbers"],
)
def test_foreign_pickles(folder, content):
    (folder / SAFETENSORS).unlink()
    (folder / PICKLE).write_bytes(content)
    with pytest.raises(ValueError, match=PICKLE):
        UNet.from_pretrained(folder)


def test_a_pickle_runs_no_code(folder):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(folder / "broken_into"),)

    (folder / SAFETENSORS).unlink()
    torch.save({"conv_in.weight": Malicious()}, folder / PICKLE)
    with pytest.raises(ValueError, match=PICKLE):
        UNet.from_pretrained(folder)
    assert not (folder / "broken_into").exists()


def test_missing_unexpected_and_misshapen_weights_are_named(folder):
    def damage(state):
        del state["conv_in.bias"]
        state["conv_extra.bias"] = torch.zeros(3)
        state["conv_out.weight"] = torch.zeros(6, 16, 3, 3)

    edit_weights(folder, damage)
    with pytest.raises(ValueError) as caught:
        UNet.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder / SAFETENSORS) in message
    assert "1 weights missing (conv_in.bias)" in message
    assert "1 weights unexpected (conv_extra.bias)" in message
    assert "1 weights of another shape (conv_out.weight is [6, 16, 3, 3], needs [3, 16, 3, 3])" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_mixed_dtypes(folder, dtype):
    edit_weights(folder, lambda state: state.update({"conv_in.bias": state["conv_in.bias"].to(dtype)}))
    with pytest.raises(ValueError, match=f"{SAFETENSORS} holds dtypes .*{dtype}"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "configures a UNet2DConditionModel"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"attention_head_dim": 5}, "attention_head_dim=5"),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768"),
        ({"block_out_channels": [16, 32.0]}, "block_out_channels"),
        ({"layers_per_block": 100_000}, "layers_per_block=100000"),  # these would build for minutes
        ({"block_out_channels": [16] * 10_000}, "block_out_channels"),
        ({"block_out_channels": [16, 2**40]}, "block_out_channels"),
        ({"num_class_embeds": 2**60}, "num_class_embeds"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"sample_size": [8, 8, 8]}, "sample_size"),
    ],
)
def test_foreign_configurations(folder, fields, message):
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        UNet.from_pretrained(folder)
    assert str(folder / CONFIG) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", '{"in_channels": 3', "[]", "\udcff", '{"in_channels": 3, "in_channels": 1}', '{"a":' * 100_000],
    ids=["empty", "cut", "list", "not UTF-8", "twice", "deep"],
)
def test_damaged_configuration(folder, text):
    (folder / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=CONFIG):
        UNet.from_pretrained(folder)


def test_missing_folder_configuration_and_weights(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        UNet.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no {CONFIG}"):
        UNet.from_pretrained(tmp_path)
    (folder / SAFETENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder} holds neither"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_files(model, folder, monkeypatch, call):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = UNet(**SMALL, num_class_embeds=3)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert_equal_weights(UNet.from_pretrained(folder), model)


def test_files_have_the_permissions_of_new_files(folder):
    (folder / "new").touch()
    for name in (CONFIG, SAFETENSORS):
        assert (folder / name).stat().st_mode == (folder / "new").stat().st_mode


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"thresholding": True}, {"thresholding": (0.995, 1.0)}),
        ({"steps_offset": 1}, {"sampler_options": {"steps_offset": 1}, "clip": 1.0}),
        ({"set_alpha_to_one": False}, {"sampler_options": {"final": "sigma_min"}}),
        ({"clip_sample": False}, {"clip": None}),
    ],
)
def test_what_a_scheduler_asks_for_reaches_sample(folder, config, told):
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler", **config}))
    sampling = models.load(folder).sampling
    assert told.items() <= sampling.items()
    assert ("clip" in sampling) != ("thresholding" in sampling)


@pytest.mark.parametrize(
    "config",
    [
        {"clip_sample_range": None}, {"beta_start": "x"}, {"beta_schedule": "none"},
        {"num_train_timesteps": 2_000_000_000}, {"num_train_timesteps": 2e9}, {"variance_type": "fixed_large_log"},
        {"variance_type": "learned"}, {"_class_name": "IPNDMScheduler"}, {"_class_name": None},
    ],
)  # fmt: skip
def test_a_broken_scheduler_names_its_file(folder, config):
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", **config}))
    with pytest.raises(ValueError, match=r"scheduler_config\.json"):
        models.load(folder)


@pytest.mark.parametrize("kept", range(1, 40))
def test_a_pickle_cut_anywhere(model, folder, kept):
    """Cut where the unpickler seeks beyond the file, it raises an OSError that is no fault of the disk."""
    (folder / SAFETENSORS).unlink()
    torch.save(model.state_dict(), folder / PICKLE)
    data = (folder / PICKLE).read_bytes()
    (folder / PICKLE).write_bytes(data[: kept * len(data) // 40])
    with pytest.raises(ValueError, match=PICKLE):
        UNet.from_pretrained(folder)


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_max": 40.0}
VIDEO = {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction",
         "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True, "clip_sample": True,
         "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "schedule", "prediction", "spacing", "sampler"),
    [
        (FLOW, FlowSchedule(3.0), "flow_prediction", "sd3", "euler"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, FlowSchedule(), "flow_prediction", "sd3", "heun"),
        ({**FLOW, "use_karras_sigmas": True}, FlowSchedule(3.0), "flow_prediction", "karras", "euler"),
        (EDM, EDMSchedule(0.002, 40.0), "edm", "karras", "euler"),
        (VIDEO, EDMSchedule(0.002, 700.0, 1.0), "v_prediction", "karras", None),
        ({"_class_name": "DPMSolverMultistepScheduler", "variance_type": None, "clip_sample": True},
         NoiseSchedule.linear(), "epsilon", "linspace", None),
    ],
)  # fmt: skip
def test_a_folder_s_process(folder, config, schedule, prediction, spacing, sampler):
    """Whatever the class, the folder has the process that its config is; and clips nothing where its class does not."""
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    told = models.load(folder).sampling
    assert told == {"schedule": schedule, "prediction": prediction, "spacing": spacing, "clip": None} | (
        {"sampler": sampler} if sampler else {}
    )
    trained = models.load(folder)
    images = fastdiff.sample(trained.unet, (1, *trained.image_shape), **trained.arguments(steps=2))
    assert bool(images.isfinite().all())


def test_the_images_of_a_network_with_learned_variance(tmp_path):
    """It returns twice the channels that it takes; an image has as many as it takes."""
    UNet(**{**SMALL, "out_channels": 2 * UNet(**SMALL).config.in_channels}).save_pretrained(tmp_path)
    assert models.load(tmp_path).image_shape[0] == UNet(**SMALL).config.in_channels
