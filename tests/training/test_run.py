"""A run that is ended at any moment: what it leaves, that it goes on to the same bits, and what Ctrl-C says."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import SEED, SEED_VARIABLE
from PIL import Image

from fastdiff.models import UNet
from fastdiff.training import keep
from fastdiff.training.run import Run
from fastdiff.training.settings import Settings
from fastdiff.training.signals import Interrupted, Signals
from fastdiff.training.unet import _run, train_unet

KILLS = int(os.environ.get("FASTDIFF_TEST_KILLS", "4"))
STEPS, SAVE_EVERY = 24, 5
TINY = {"channels": (8, 16), "batch_size": 4, "warmup": 2, "seed": SEED, "device": "cpu"}
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(autouse=True)
def _tell_the_seed():
    print(f"{SEED_VARIABLE}={SEED}")


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(keep, "GRID_STEPS", 1)


def child(out: str, resume: bool) -> None:
    """A training as the command line runs it; its exit code says how it ended."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)  # a suite that runs in a shell's background is deaf to Ctrl-C
    keep.GRID_STEPS = 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    step = Run.train_step

    def first_step(run):
        (Path(out).parent / "started").touch()
        Run.train_step = step
        return step(run)

    Run.train_step = first_step
    try:
        train_unet("digits", out, steps=STEPS, save_every=SAVE_EVERY, resume=resume, progress=False, **TINY)
    except Interrupted as interrupted:
        (Path(out).parent / "told").write_text(str(interrupted))
        sys.exit(128 + interrupted.signal)
    except KeyboardInterrupt:  # before the first step, or after the last file
        sys.exit(99)


def assert_whole(out: Path) -> None:
    """Whatever is in the folder can be read, and comes after the checkpoint."""
    files = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")]
    if files:
        assert (out / "checkpoint.pt").exists()
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        else:
            UNet.from_pretrained(out)


def step_of(out: Path) -> int:
    path = out / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def kill_and_resume(folder: Path, kills: int, rng: random.Random) -> list[str]:
    """End trainings at random moments, resume them, and compare what they come to with one that was left alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastdiff.training.unet", "matplotlib.figure", "sklearn.datasets"])
    with torch.random.fork_rng():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        straight = folder / "straight"
        began = time.monotonic()
        train_unet("digits", straight, steps=STEPS, save_every=SAVE_EVERY, progress=False, **TINY)
        length = time.monotonic() - began
        torch.set_num_threads(threads)
    whole = torch.load(straight / "checkpoint.pt", weights_only=True)
    outcomes: list[str] = []
    run, done = 0, True
    while len(outcomes) < kills or not done:
        if done:
            run, done = run + 1, False
        out = folder / str(run) / "out"
        out.parent.mkdir(exist_ok=True)
        (out.parent / "started").unlink(missing_ok=True)
        fresh, before = not (out / "checkpoint.pt").exists(), step_of(out)
        process = context.Process(target=child, args=(str(out), not fresh))
        process.start()
        while not (out.parent / "started").exists() and process.is_alive():
            time.sleep(0.001)
        number, place = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), "any moment"
        if len(outcomes) < kills:
            if fresh and rng.random() < 0.7:
                place = "the first checkpoint"
                while process.is_alive() and not (out.exists() and any(out.glob("*checkpoint.pt*"))):
                    time.sleep(0.0002)
                time.sleep(rng.random() * 0.05 * (rng.random() < 0.8))
            else:
                process.join(rng.random() * length)
            if process.is_alive():
                os.kill(process.pid, number)
        process.join(120)
        code = process.exitcode
        assert code is not None, "it neither ended nor went on"
        assert_whole(out)
        step = step_of(out)
        assert step >= before
        if code == 0:
            done = True
            state = torch.load(out / "checkpoint.pt", weights_only=True)
            for part in ("step", "losses", "generator", "model", "ema", "random"):
                _assert_equal(state[part], whole[part], part)
            for name in ("diffusion_pytorch_model.safetensors", "config.json", "scheduler_config.json"):
                assert (out / name).read_bytes() == (straight / name).read_bytes(), name
            name = f"samples/step-{STEPS:06d}.png"
            assert (out / name).read_bytes() == (straight / name).read_bytes()
            assert not list(out.rglob("*.tmp"))
        else:
            assert code in (-number, 128 + number, 99), code
            outcomes.append(f"run {run}: {number.name:7} at {place}: exit {code}, from step {before} to {step}")
    return [*outcomes, f"{run} runs, {len(outcomes)} kills: every run came to the bits of one that was left alone"]


def _assert_equal(a, b, name):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            _assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            _assert_equal(x, y, name)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


@posix
@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path):
    print("\n".join(kill_and_resume(tmp_path, KILLS, random.Random(SEED))))


def settings(**more):
    return Settings("digits", **{**TINY, "steps": 6, "save_every": 4, **more})


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_keeps_it(tmp_path, monkeypatch, number):
    step = Run.train_step

    def third(run):
        if run.step == 2:
            os.kill(os.getpid(), number)
        return step(run)

    monkeypatch.setattr(Run, "train_step", third)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=r"interrupted at step 3 of 6; .* holds step 3") as raised:
        _run(settings(), tmp_path).loop(progress=False)
    assert isinstance(raised.value, KeyboardInterrupt)
    assert raised.value.signal == number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    UNet.from_pretrained(tmp_path)
    assert not list((tmp_path / "samples").iterdir())  # no pictures: whoever asked for an end does not wait for them


@posix
def test_a_signal_while_pictures_are_drawn_interrupts_at_once(tmp_path, monkeypatch):
    def drawn(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("it was not interrupted")

    monkeypatch.setattr(keep, "plot_loss", drawn)
    with pytest.raises(Interrupted, match=r"at step 4 of 6; .* holds step 4"):
        _run(settings(), tmp_path).loop(progress=False)


@posix
def test_a_second_signal_interrupts_at_once_and_an_ignored_one_stays_ignored():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked == signal.SIGTERM
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.asked is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_trains_without_signals(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: _run(settings(steps=1), tmp_path).loop(progress=False))
    thread.start()
    thread.join()
    assert (tmp_path / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("place", ["write_json", "plot_loss", "save_samples", "UNet.save_pretrained"])
def test_what_is_not_the_checkpoint_cannot_fail_the_run(tmp_path, monkeypatch, place):
    """In the middle of a run it is a warning; at the end the model itself is needed, the pictures are not."""
    calls = []

    def full(*_, **__):
        calls.append(place)
        raise OSError(28, f"cannot write it: {place} is full")

    monkeypatch.setattr(f"fastdiff.training.keep.{place}", full)
    run = _run(settings(), tmp_path)
    pictures = place in ("plot_loss", "save_samples")
    ends = contextlib.nullcontext() if pictures else pytest.raises(OSError, match="is full")
    with ends, pytest.warns(UserWarning, match=rf"{place} is full \(the training goes on\)"):
        run.loop(progress=False)
    assert len(calls) >= 2
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6


def test_without_matplotlib_there_is_no_curve(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r'pip install "fastdiff-torch\[train\]"'):
        _run(settings(steps=1), tmp_path).loop(progress=False)
    assert (tmp_path / "samples" / "step-000001.png").exists()


def test_a_run_of_hours_is_told_beforehand(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(settings(), tmp_path / "short").loop(progress=False)
    monkeypatch.setattr("fastdiff.training.loop._LONG", 0.0)
    with pytest.warns(UserWarning, match=r"1 steps of .* s will take about 0 hours on this cpu"):
        _run(settings(), tmp_path / "long").loop(progress=False)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_targets_are_the_papers(tmp_path, prediction, seed):
    """A network that gives what it should predict has no loss: x_t and the target solve the two equations of x_0, ε."""
    run = _run(settings(prediction=prediction), tmp_path)
    x0, noise, t = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 500, 998, 999])
    bars = run.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    alpha, sigma = bars.sqrt(), (1 - bars).sqrt()
    x_t, target = alpha * x0 + sigma * noise, run._target(x0, noise, t).double()
    if prediction == "v_prediction":  # Salimans & Ho (2022), Appendix D: x̂ = α x_t − σ v
        torch.testing.assert_close(alpha * x_t - sigma * target, x0.double(), rtol=1e-5, atol=1e-5)
    elif prediction == "epsilon":
        torch.testing.assert_close(x_t - sigma * target, alpha * x0, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(target, x0.double())
