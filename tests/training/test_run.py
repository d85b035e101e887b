"""A run that is ended at any moment: what it leaves, that it goes on to the same bits, and what Ctrl-C says."""

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
        fresh = not (out / "checkpoint.pt").exists()
        before = 0 if fresh else torch.load(out / "checkpoint.pt", weights_only=True)["step"]
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
        step = 0 if not (out / "checkpoint.pt").exists() else torch.load(out / "checkpoint.pt", weights_only=True)["step"]
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
