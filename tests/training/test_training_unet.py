"""fastdiff train: resuming to the bit, files that survive a kill, and arguments refused before any work."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from helpers import SEED, SEED_VARIABLE
from PIL import Image

from fastdiff.models import UNet
from fastdiff.models.trained import load
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.training import data as image_data
from fastdiff.training.folder import save_samples
from fastdiff.training.settings import FOLDER_SAMPLING, Settings, scheduler_config
from fastdiff.training.unet import _run
from fastdiff.training.unet import train_unet as train

TINY = {"channels": (8, 16), "batch_size": 4, "warmup": 2, "seed": SEED, "progress": False, "device": "cpu"}


@pytest.fixture(autouse=True)
def _tell_the_seed():
    print(f"{SEED_VARIABLE}={SEED}")


@pytest.fixture(scope="module", autouse=True)
def _short_samples():
    """Grids of samples in three steps instead of fifty: most of the time here would go into them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.training.keep.GRID_STEPS", 3)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of six steps that was never interrupted."""
    return train("digits", tmp_path_factory.mktemp("straight") / "run", steps=6, save_every=4, **TINY)


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_equal(a, b, name="state"):
    """Equal to the bit, whatever is nested in whatever."""
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), name
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{name}[{index}]")
    else:
        assert a == b, name


# ---- resuming


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_a_straight_one(tmp_path, straight):
    train("digits", tmp_path, steps=2, save_every=100, **TINY)
    torch.manual_seed(random.randrange(2**31))  # the global generator has no say
    train("digits", tmp_path, steps=6, save_every=4, resume=True, **TINY)
    resumed, whole = checkpoint(tmp_path), checkpoint(straight)
    for part in ("step", "losses", "generator", "model", "ema", "optimizer"):
        assert_equal(resumed[part], whole[part], part)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (straight / name).read_bytes()
    assert (tmp_path / "samples" / "step-000006.png").read_bytes() == (
        straight / "samples" / "step-000006.png"
    ).read_bytes()


def test_another_seed_gives_another_run(tmp_path, straight):
    train("digits", tmp_path, steps=1, **{**TINY, "seed": SEED + 1})
    assert checkpoint(tmp_path)["losses"][0] != checkpoint(straight)["losses"][0]


def test_training_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    train("digits", tmp_path, steps=1, **TINY)
    assert torch.equal(torch.get_rng_state(), before)


def test_resuming_refuses_other_settings_and_other_images(tmp_path, straight):
    with pytest.raises(ValueError, match=r"ema_decay 0\.999 \(now 0\.5\)"):
        train("digits", straight, steps=7, resume=True, ema_decay=0.5, **TINY)
    with pytest.raises(ValueError, match="done 6 already"):
        train("digits", straight, steps=5, resume=True, **TINY)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="other images"):
        train(tmp_path, straight, size=8, steps=7, resume=True, **TINY)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train("digits", tmp_path, resume=True)
    with pytest.raises(FileExistsError, match="resume"):
        train("digits", straight, **TINY)


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path, straight):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()

    def refused(match):
        with pytest.raises(ValueError, match=rf"checkpoint\.pt {match}"):
            train("digits", folder, steps=7, save_every=4, resume=True, **TINY)

    for content in (b"", b"hi\n", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused("is unreadable")
    for foreign in ([1], torch.ones(3), {"state_dict": {}}):
        torch.save(foreign, path)
        refused("is no checkpoint of fastdiff train")
    state = torch.load(straight / "checkpoint.pt", weights_only=True)
    for name in ("model", "optimizer", "generator", "losses"):
        torch.save({**state, name: {}}, path)
        refused("does not fit this model")
    torch.save({**state, "seconds": "many"}, path)
    refused("is no checkpoint of fastdiff train: its seconds is a str")


def test_resuming_elsewhere_is_said(straight, tmp_path):
    import shutil

    copy = shutil.copytree(straight, tmp_path / "copy")
    state = checkpoint(copy)
    state["environment"]["threads"] += 1
    torch.save(state, copy / "checkpoint.pt")
    with pytest.warns(UserWarning, match="equal bits are not assured"):
        train("digits", copy, steps=6, save_every=4, resume=True, **TINY)


# ---- what is learnt, and what is written


@pytest.mark.slow
def test_the_loss_falls_and_the_average_follows(tmp_path):
    folder = train("digits", tmp_path, steps=120, **{**TINY, "channels": (16, 16), "batch_size": 16})
    state = checkpoint(folder)
    assert state["losses"][-30:].mean() < 0.7 * state["losses"][:10].mean()
    weight = "conv_in.weight"
    assert not torch.equal(state["ema"][weight], state["model"][weight])
    assert_equal(dict(UNet.from_pretrained(folder).state_dict()), dict(state["ema"]))


def test_the_folder_tells_how_it_was_made(straight):
    record = json.loads((straight / "training.json").read_text())
    settings = {name: value for name, value in TINY.items() if name != "progress"}
    expected = asdict(Settings("digits", steps=6, save_every=4, **settings))
    assert record["settings"] == json.loads(json.dumps(expected))
    assert record["classes"] == list("0123456789")
    assert record["loss"]["step"] == [1, 2, 3, 4, 5, 6]
    assert record["loss"]["mean"] == pytest.approx(checkpoint(straight)["losses"].tolist(), abs=1e-6)
    assert record["environment"]["torch"] == torch.__version__
    assert record["sampling"]["sampler"] == "ddim"
    config = json.loads((straight / "config.json").read_text())
    assert (config["num_class_embeds"], config["null_class"], config["attention_head_dim"]) == (11, 10, None)
    for name in ("loss.png", "samples/step-000004.png", "samples/step-000006.png"):
        with Image.open(straight / name) as opened:
            opened.load()
    assert not list(straight.rglob("*.tmp"))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_diffusers_reads_the_schedule_that_was_trained_with(schedule, tmp_path):
    ours = getattr(NoiseSchedule, schedule)()
    config = scheduler_config(ours)
    assert NoiseSchedule.from_diffusers(config) == ours
    diffusers = pytest.importorskip("diffusers")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    theirs = diffusers.DDPMScheduler.from_pretrained(tmp_path).alphas_cumprod.double()
    torch.testing.assert_close(theirs, ours.alphas_cumprod, rtol=2e-4, atol=1e-6)  # theirs is computed in float32


def test_diffusers_loads_the_folder(straight):
    diffusers = pytest.importorskip("diffusers")
    theirs, ours = diffusers.UNet2DModel.from_pretrained(straight).eval(), UNet.from_pretrained(straight)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, class_labels=labels).sample, ours(x, t, labels))


def test_a_folder_of_pictures_in_colour(tmp_path):
    for name, colour in (("ant", "red"), ("bee", "blue")):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (20, 16), colour).save(tmp_path / "in" / name / "1.png")
    folder = train(tmp_path / "in", tmp_path / "out", size=8, steps=2, schedule="linear", dtype="bfloat16", **TINY)
    record = json.loads((folder / "training.json").read_text())
    assert (record["classes"], record["images"]) == (["ant", "bee"], 2)
    assert UNet.from_pretrained(folder).config.in_channels == 3


def test_pictures_without_classes_train_an_unconditional_model(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (8, 8), 200).save(tmp_path / "in" / "1.png")
    folder = train(tmp_path / "in", tmp_path / "out", size=8, steps=1, **TINY)
    config = UNet.from_pretrained(folder).config
    assert (config.num_class_embeds, config.null_class, config.in_channels) == (None, None, 1)


# ---- kills and errors


@pytest.mark.slow
def test_a_killed_run_leaves_files_that_load(tmp_path):
    call = f"train_unet('digits', {str(tmp_path)!r}, steps=10**6, save_every=1, **{TINY})"
    code = f"from fastdiff.training import keep; keep.GRID_STEPS = 3; from fastdiff.training.unet import *; {call}"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 240  # a busy machine takes a minute to import torch
        # The picture is the last that a save writes; before the first one is there, resuming has to write the rest.
        while not (tmp_path / "samples" / "step-000001.png").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(random.random() / 2)  # anywhere in a step or a save
    finally:
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.wait()
    state = checkpoint(tmp_path)
    UNet.from_pretrained(tmp_path)
    json.loads((tmp_path / "training.json").read_text())
    for path in [tmp_path / "loss.png", *tmp_path.glob("samples/*.png")]:
        with Image.open(path) as opened:
            opened.load()
    train("digits", tmp_path, steps=state["step"] + 1, save_every=1, resume=True, **TINY)
    assert checkpoint(tmp_path)["step"] == state["step"] + 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(image_data.ImageData, "images", lambda self, index: torch.full((len(index), 1, 8, 8), 1e30))
    with pytest.raises(FloatingPointError, match="step 3"):
        train("digits", tmp_path, steps=3, **TINY)


@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("steps", 0, ValueError),
        ("steps", 1.5, TypeError),
        ("batch_size", True, TypeError),
        ("batch_size", 0, ValueError),
        ("lr", 0, ValueError),
        ("lr", float("nan"), ValueError),
        ("lr", "fast", TypeError),
        ("warmup", 0, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
        ("size", 9, ValueError),
        ("channels", (), ValueError),
        ("channels", (12, 16), ValueError),
        ("layers", 0, ValueError),
        ("layers", 100_000, ValueError),
        ("label_dropout", 1.0, ValueError),
        ("ema_decay", -0.1, ValueError),
        ("schedule", "sudden", ValueError),
        ("dtype", "float16", ValueError),
        ("device", "abacus", ValueError),
        ("device", 0, TypeError),
        ("save_every", 0, ValueError),
        ("no_such_setting", 1, TypeError),
    ],
)
def test_bad_settings_are_named_before_any_work(tmp_path, setting, value, error):
    with pytest.raises(error, match=setting):
        train("digits", tmp_path / "out", **{setting: value})
    assert not (tmp_path / "out").exists()


def test_bad_data_and_folders_are_named_before_any_work(tmp_path):
    with pytest.raises(TypeError, match="data"):
        train(3, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="missing"):
        train(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        train("digits", tmp_path / "file")
    assert not (tmp_path / "out").exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("place", ["write_json", "plot_loss", "save_samples", "UNet.save_pretrained"])
def test_a_run_that_is_killed_in_its_first_save_can_be_resumed(tmp_path, straight, monkeypatch, place):
    """The checkpoint is there first; the resumed run writes what the killed save did not, even at its last step."""
    with monkeypatch.context() as patch:
        patch.setattr(f"fastdiff.training.keep.{place}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("digits", tmp_path, steps=6, save_every=6, **TINY)
    assert checkpoint(tmp_path)["step"] == 6
    with pytest.raises(FileExistsError, match="resume it"):
        train("digits", tmp_path, steps=6, save_every=6, **TINY)
    train("digits", tmp_path, steps=6, save_every=6, resume=True, **TINY)
    for name in ("diffusion_pytorch_model.safetensors", "config.json", "samples/step-000006.png"):
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes()
    assert (tmp_path / "loss.png").exists()


def test_a_folder_without_a_checkpoint_can_be_started_again(tmp_path, straight, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("fastdiff.training.folder.torch.save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("digits", tmp_path, steps=1, **TINY)
    train("digits", tmp_path, steps=1, **TINY)
    assert checkpoint(tmp_path)["step"] == 1
    (tmp_path / "checkpoint.pt").unlink()  # what is left is a model that someone wants to keep
    before = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"model\.safetensors, but no checkpoint\.pt to resume from"):
        train("digits", tmp_path, steps=1, **TINY)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_other_people_s_temporary_files_stay(tmp_path):
    theirs = [tmp_path / ".notes.tmp", tmp_path / "samples" / ".mine.tmp", tmp_path / ".config.json.99.tmp"]
    ours = [tmp_path / f".checkpoint.pt.{'0f' * 8}.tmp", tmp_path / "samples" / f".step-000500.png.{'0f' * 8}.tmp"]
    (tmp_path / "samples").mkdir()
    (tmp_path / ".folder.tmp").mkdir()
    for path in (*theirs, *ours):
        path.write_text("mine")
    train("digits", tmp_path, steps=1, **TINY)
    assert [path.exists() for path in (*theirs, *ours)] == [True, True, True, False, False]
    assert (tmp_path / ".folder.tmp").is_dir()


def test_the_process_s_defaults_change_nothing(tmp_path, straight):
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        train("digits", tmp_path, steps=6, save_every=4, **TINY)
        assert torch.get_default_dtype() == torch.float64
        assert torch.empty(0).device.type == "meta"
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a limit of POSIX")
def test_a_full_disk_names_the_checkpoint(tmp_path):
    """A file may grow to 100 kB only: the checkpoint is larger, and the folder stays as it was."""
    code = (
        "import resource; from fastdiff.training.unet import train_unet as train;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        f"train('digits', {str(tmp_path)!r}, steps=1, **{TINY})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"cannot write {tmp_path / 'checkpoint.pt'}: File too large" in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_learning_rate_and_average_are_the_formulas(tmp_path):
    """After each step, against numbers worked out by hand: the warm-up, and the average whose decay grows."""
    settings = {name: value for name, value in TINY.items() if name != "progress"} | {"warmup": 3, "ema_decay": 0.2}
    run = _run(Settings("digits", steps=5, **settings), tmp_path)
    average = [parameter.detach().double() for parameter in run.model.parameters()]
    for step in range(5):
        assert run.optimizer.param_groups[0]["lr"] == 2e-3 * min(1, (step + 1) / 3)
        run.train_step()
        run.step += 1
        decay = min(0.2, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * b.detach() for a, b in zip(average, run.model.parameters(), strict=True)]
        for got, expected in zip(run.average.module.parameters(), average, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path, straight):
    """Before LambdaLR, the optimiser's state did not hold the first learning rate."""
    train("digits", tmp_path, steps=2, save_every=100, **TINY)
    state = checkpoint(tmp_path)
    del state["optimizer"]["param_groups"][0]["initial_lr"]
    torch.save(state, tmp_path / "checkpoint.pt")
    train("digits", tmp_path, steps=6, save_every=4, resume=True, **TINY)
    assert_equal(checkpoint(tmp_path)["model"], checkpoint(straight)["model"])


# ---- starting from weights, overwriting


def test_a_folder_without_a_checkpoint_starts_again_from_its_weights_or_without_them(tmp_path, straight):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    (folder / "checkpoint.pt").unlink()
    before = dict(UNet.from_pretrained(folder).state_dict())
    settings = Settings("digits", steps=6, save_every=4, **{k: v for k, v in TINY.items() if k != "progress"})
    with pytest.warns(UserWarning, match=r"no checkpoint\.pt: starting again at step 0, from its weights"):
        run = _run(settings, folder, resume=True)
    assert run.step == 0
    assert_equal(dict(run.model.state_dict()), before)
    with pytest.raises(ValueError, match="another one than size, channels"), pytest.warns(match="no checkpoint"):
        train("digits", folder, resume=True, **{**TINY, "channels": (8, 8)})
    with pytest.raises(ValueError, match="give one of them"):
        train("digits", folder, resume=True, overwrite=True, **TINY)
    (folder / "mine.txt").write_text("stays")
    train("digits", folder, steps=1, overwrite=True, **TINY)
    assert checkpoint(folder)["step"] == 1
    assert [path.name for path in (folder / "samples").iterdir()] == ["step-000001.png"]
    assert (folder / "mine.txt").exists()


def test_overwriting_leaves_nothing_to_resume_by_mistake(tmp_path, straight, monkeypatch):
    """Killed before its first checkpoint, a run that overwrites has left nothing of the former one."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    monkeypatch.setattr("fastdiff.training.run.Run.train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train("digits", folder, steps=1, overwrite=True, **TINY)
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train("digits", folder, steps=1, resume=True, **TINY)


def test_the_learning_rate_may_change_on_resume(tmp_path, straight):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    settings = Settings("digits", **{**{k: v for k, v in TINY.items() if k != "progress"}, "steps": 9, "lr": 1e-5})
    run = _run(settings, folder, resume=True)
    assert run.step == 6
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-5]
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train_step()
    # AdamW moves a weight by about lr a step, lr · weight decay apart.
    most = max((a - b).abs().max().item() for a, b in zip(run.model.parameters(), before, strict=True))
    assert 0 < most < 1e-4


def test_init_starts_from_another_model_s_weights(tmp_path, straight):
    settings = Settings("digits", steps=2, init=str(straight), seed=SEED, device="cpu", batch_size=4)
    run = _run(settings, tmp_path / "a")
    assert_equal(dict(run.model.state_dict()), dict(UNet.from_pretrained(straight).state_dict()))
    assert_equal(dict(run.average.module.state_dict()), dict(UNet.from_pretrained(straight).state_dict()))
    run.loop(progress=False)
    more = {"steps": 3, "resume": True, "channels": None, "warmup": 200}
    train("digits", tmp_path / "a", init=str(straight), **{**TINY, **more})
    assert checkpoint(tmp_path / "a")["step"] == 3
    with pytest.raises(ValueError, match="leave them out"):
        train("digits", tmp_path / "b", init=str(straight), **TINY)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train("digits", tmp_path / "b", init="nowhere", device="cpu")
    for name, colour in (("ant", "red"), ("bee", "blue")):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "in" / name / "1.png")
    with pytest.raises(ValueError, match="1 channels in and 1 out; the data have 3"):
        train(tmp_path / "in", tmp_path / "b", init=str(straight), device="cpu")
    for file in (tmp_path / "in").rglob("*.png"):
        Image.new("L", (8, 8), 3).save(file)
    with pytest.raises(ValueError, match="are 10 without names; those of the data are ant, bee"):
        train(tmp_path / "in", tmp_path / "b", init=str(straight), device="cpu")
    with pytest.warns(UserWarning, match="another schedule or prediction"):
        train("digits", tmp_path / "c", init=str(straight), prediction="sample", steps=1, device="cpu", progress=False)
    assert not (tmp_path / "b").exists()


# ---- how the model is sampled


def test_a_folder_is_sampled_by_algorithm_2_and_digits_as_was_measured_for_them(tmp_path, straight):
    assert load(straight).sampling["steps"] == 50
    (tmp_path / "in" / "ant").mkdir(parents=True)
    Image.new("L", (8, 8), 200).save(tmp_path / "in" / "ant" / "1.png")
    folder = train(tmp_path / "in", tmp_path / "out", size=8, steps=1, timesteps=20, prediction="v_prediction", **TINY)
    trained = load(folder)
    arguments = trained.arguments(torch.zeros(1, dtype=torch.long))
    assert (arguments["sampler"], arguments.get("steps"), arguments["prediction"]) == ("ddpm", None, "v_prediction")
    assert "uncond_kwargs" not in arguments  # one network call a step
    assert arguments["schedule"] == NoiseSchedule.cosine(20)
    asked = train(tmp_path / "in", tmp_path / "asked", size=8, steps=1, sampler="heun", sampling_steps=7, guidance=2.0,
                  **TINY)  # fmt: skip
    arguments = load(asked).arguments(torch.zeros(1, dtype=torch.long))
    assert (arguments["sampler"], arguments["steps"], arguments["guidance_scale"]) == ("heun", 7, 2.0)
    assert FOLDER_SAMPLING == {"sampler": "ddpm", "clip": 1.0}


def test_any_schedule_can_be_written_for_diffusers(tmp_path):
    ours = NoiseSchedule.sigmoid(50)
    assert NoiseSchedule.from_diffusers(scheduler_config(ours, "sample")).alphas_cumprod.numpy() == pytest.approx(
        ours.alphas_cumprod.numpy(), rel=1e-12
    )


def test_images_are_mirrored_half_of_the_time(tmp_path):
    (tmp_path / "in").mkdir()
    half = Image.new("L", (8, 8), "black")
    half.paste("white", (0, 0, 4, 8))
    half.save(tmp_path / "in" / "a.png")
    settings = Settings(str(tmp_path / "in"), size=8, flip=True, channels=(8, 8), batch_size=200, device="cpu", seed=0)
    run = _run(settings, tmp_path / "out")
    seen = []
    run.model.forward = lambda x, t, **_: seen.append(x) or x * 0 + next(run.model.parameters()).sum()
    run.schedule = NoiseSchedule.from_alphas_cumprod(torch.ones(1, dtype=torch.float64))  # nothing is noised
    run.train_step()
    left, right = seen[0][..., :4].mean((1, 2, 3)), seen[0][..., 4:].mean((1, 2, 3))
    assert torch.equal(left, -right)
    assert set(left.tolist()) == {-1.0, 1.0}
    assert 70 <= int((left > 0).sum()) <= 130  # a fixed seed's 200 throws of a coin


def test_the_grid_has_a_row_a_class_with_its_name(tmp_path):
    names = ["ant", "bee", "ein sehr langer Name einer Klasse", "猫"]
    images = torch.linspace(-1, 1, 24).view(24, 1, 1, 1).expand(24, 3, 8, 8)
    save_samples(tmp_path / "a.png", images, 6, names)
    save_samples(tmp_path / "b.png", images, 6, [])
    with Image.open(tmp_path / "a.png") as named, Image.open(tmp_path / "b.png") as plain:
        assert named.height == plain.height
        margin = named.width - plain.width
        assert named.crop((margin, 0, named.width, named.height)).tobytes() == plain.tobytes()
        rows = [named.crop((0, i * plain.height // 4, margin, (i + 1) * plain.height // 4)) for i in range(4)]
        assert all(row.convert("L").getextrema()[0] < 128 for row in rows[:3])  # ink; the last has no Latin letters
        assert len({row.tobytes() for row in rows[:3]}) == 3
