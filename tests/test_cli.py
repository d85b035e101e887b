"""The command line, as a user runs it: pictures, messages, exit codes, and nothing half written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}


def fastdiff(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastdiff.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def test_sample_without_arguments_draws_64_digits(tmp_path: Path) -> None:
    result = fastdiff("sample", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
    with Image.open(tmp_path / "samples.png") as picture:
        colours = picture.convert("L").getextrema()
        assert picture.width == picture.height >= 8 * 64
    assert colours == (0, 255)  # ink and paper


def test_batches_and_offsets_do_not_change_an_image(tmp_path: Path) -> None:
    common = ("--steps", 4, "--class", "3", "--seed", 11)
    # Each run is one batch of two, so that even the network's rounding is the same.
    assert fastdiff("sample", "-n", 2, "--sample-offset", 2, *common, "--out", "late.png", cwd=tmp_path).returncode == 0
    assert fastdiff("sample", "-n", 4, "--batch-size", 2, *common, "--out", "all.png", cwd=tmp_path).returncode == 0
    with Image.open(tmp_path / "late.png") as late, Image.open(tmp_path / "all.png") as everything:
        height = late.height
        lower = everything.crop((0, everything.height - height, everything.width, everything.height))
        assert lower.tobytes() == late.tobytes()


def test_gif_shows_the_reverse_process(tmp_path: Path) -> None:
    arguments = ("sample", "-n", 2, "--sampler", "ddim", "--steps", 5, "--gif", "steps.gif", "--dtype", "bfloat16")
    result = fastdiff(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "steps.gif") as gif:
        assert gif.n_frames == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "--model", "nowhere"), "nowhere"),
        (("sample", "--out", "no/such/folder.png"), "does not exist"),
        (("sample", "--out", "samples.jpg"), ".png"),
        (("sample", "--class", "eleven"), "eleven"),
        (("sample", "--device", "abacus"), "abacus"),
        (("sample", "--backend", "magic"), "magic"),
        (("sample", "--steps", "5000"), "5000"),
        (("sample", "--seed", "-1"), "seed"),
        (("sample", "--number", "0"), "number"),
        (("sample", "--sampler", "astrology"), "astrology"),
        (("sample", "--number", "65", "--gif", "x.gif"), "batch"),
        (("train", "--data", "nowhere", "--out", "model"), "nowhere"),
        (("train", "--data", "digits", "--out", "model", "--steps", "0"), "steps"),
        (("train", "--data", "digits", "--out", "model", "--channels", "wide"), "channels"),
        (("dance",), "dance"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = fastdiff(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"not a checkpoint")
    result = fastdiff("sample", "--model", folder, cwd=tmp_path)
    assert result.returncode == 2
    assert "diffusion_pytorch_model.safetensors" in result.stderr or "config.json" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_picture(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastdiff.cli", "sample", "--sampler", "ddpm", "--steps", "1000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 60
    seen = ""
    while "%" not in seen and time.monotonic() < deadline:  # until the progress bar moves
        seen += process.stderr.read(1)
    process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_info_and_help(tmp_path: Path) -> None:
    info = fastdiff("info", cwd=tmp_path)
    assert info.returncode == 0, info.stderr
    assert "native extension" in info.stdout
    assert "update on cpu" in info.stdout
    for arguments in (("--help",), ("sample", "--help"), ("train", "--help")):
        shown = fastdiff(*arguments, cwd=tmp_path)
        assert shown.returncode == 0
        assert "Usage" in shown.stdout
    # What is in brackets is shown too.
    assert "[default: the model's own, or 0]" in " ".join(fastdiff("sample", "--help", cwd=tmp_path).stdout.split())


def test_an_option_of_another_sampler_is_refused(tmp_path: Path) -> None:
    """The folder's own eta goes with its own sampler; one that was asked for is not dropped without a word."""
    result = fastdiff("sample", "-n", 1, "--sampler", "ddpm", "--steps", 2, "--eta", 0.5, cwd=tmp_path)
    assert result.returncode == 2
    assert "sampler='ddpm' does not take eta" in result.stderr
    assert fastdiff("sample", "-n", 1, "--sampler", "ddpm", "--steps", 2, cwd=tmp_path).returncode == 0
