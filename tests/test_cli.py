"""The command line, as a user runs it: pictures, messages, exit codes, and nothing half written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from helpers import run
from PIL import Image
from typer.testing import CliRunner

import fastdiff as package
from fastdiff import FlowSchedule, NoiseSchedule, Plan, models, samplers
from fastdiff.cli.app import command
from fastdiff.cli.arguments import labels_of
from fastdiff.cli.sample import film
from fastdiff.images import make_grid
from fastdiff.sampling.accelerated import is_accelerated
from fastdiff.sampling.state import State
from fastdiff.training.pictures import read_picture
from fastdiff.training.run import Run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}


def fastdiff(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastdiff", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_sample_without_arguments_draws_64_digits(tmp_path: Path) -> None:
    result = fastdiff("sample", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
    with Image.open(tmp_path / "samples.png") as picture:
        colours = picture.convert("L").getextrema()
        assert picture.width == picture.height >= 8 * 64
    assert colours == (0, 255)  # ink and paper


@pytest.mark.slow
def test_batches_and_offsets_do_not_change_an_image(tmp_path: Path) -> None:
    common = ("--steps", 4, "--class", "3", "--seed", 11)
    # Each run is one batch of two, so that even the network's rounding is the same.
    assert fastdiff("sample", "-n", 2, "--sample-offset", 2, *common, "--out", "late.png", cwd=tmp_path).returncode == 0
    assert fastdiff("sample", "-n", 4, "--batch-size", 2, *common, "--out", "all.png", cwd=tmp_path).returncode == 0
    with Image.open(tmp_path / "late.png") as late, Image.open(tmp_path / "all.png") as everything:
        height = late.height
        lower = everything.crop((0, everything.height - height, everything.width, everything.height))
        assert lower.tobytes() == late.tobytes()


@pytest.mark.slow
def test_gif_shows_the_reverse_process(tmp_path: Path) -> None:
    arguments = ("sample", "-n", 2, "--sampler", "ddim", "--steps", 5, "--gif", "steps.gif", "--dtype", "bfloat16")
    result = fastdiff(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "steps.gif") as gif:
        assert gif.n_frames == 6  # the noise, and the state after each step


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
        (("sample", "--spacing", "karas"), "did you mean 'karras'?"),
        (("sample", "--clip", "much"), "--clip must be a number, or none; got 'much'"),
        (("sample", "--option", "order"), "NAME=VALUE"),
        (("sample", "--option", "order=3"), "does not take order"),
        (("sample", "--schedule", "liner"), "schedule is 'liner'"),
        (("sample", "--strength", "0.5"), "--strength needs --image"),
        (("sample", "--mask", "mask.png"), "--mask needs --image"),
        (("sample", "--image", "nowhere.png"), "nowhere.png"),
        (("sample", "--interpolate", "a.png"), "2 arguments"),
        (("sample", "--interpolate", "a.png", "b.png"), "a.png"),
        (("sample", "--interpolate", "a.png", "b.png", "--steps", "5"), "--interpolate goes without --steps"),
        (("sample", "--interpolate", "a.png", "b.png", "--gif", "x.gif"), "--interpolate goes without --gif"),
        (("sample", "--accelerate", "perhaps"), "perhaps"),
        (("sample", "--threads", "0"), "threads"),
        (("sample", "--threads", "99999"), "threads"),  # OpenMP would end the process
        (("train", "--data", "nowhere", "--out", "model"), "nowhere"),
        (("train", "--data", "digits", "--out", "model", "--steps", "0"), "steps"),
        (("train", "--data", "digits", "--out", "model", "--channels", "wide"), "channels"),
        (("train", "--data", "digits", "--out", "model", "--sampler", "astrology"), "astrology"),
        (("train", "--data", "digits", "--out", "model", "--prediction", "score"), "prediction='score'"),
        (
            ("train", "--data", "digits", "--out", "model", "--timesteps", "9", "--sampling-steps", "50"),
            "steps must be in [1, 9]",
        ),
        (("train", "--data", "digits", "--out", "model", "--resume"), "nothing to resume"),
        (("train", "--data", "digits", "--out", "model", "--resume", "--overwrite"), "give one of them"),
        (("dance",), "dance"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_errors_go_to_standard_error(tmp_path: Path) -> None:
    result = fastdiff("sample", "--class", "eleven", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: --class eleven")
    assert len(result.stderr.splitlines()) == 1


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"not a checkpoint")
    result = fastdiff("sample", "--model", folder, cwd=tmp_path)
    assert result.returncode == 2
    assert "diffusion_pytorch_model.safetensors" in result.stderr or "config.json" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_picture(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastdiff", "sample", "--sampler", "ddpm", "--steps", "1000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A suite that runs in a shell's background is started deaf to Ctrl-C, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    deadline = time.monotonic() + 60
    seen = ""
    while "%" not in seen and time.monotonic() < deadline:  # until the progress bar moves
        seen += process.stderr.read(1)
    process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_info_and_help(tmp_path: Path) -> None:
    info = fastdiff("info", cwd=tmp_path)
    assert info.returncode == 0, info.stderr
    assert "native extension" in info.stdout
    assert "update on cpu" in info.stdout
    for arguments in (("--help",), ("sample", "--help"), ("train", "--help"), ("plan", "--help")):
        shown = run(*arguments)
        assert shown.exit_code == 0
        assert "Usage" in shown.output
    # What is in brackets is shown too.
    assert "[default: the model's or sampler's]" in " ".join(fastdiff("sample", "--help", cwd=tmp_path).stdout.split())


@pytest.mark.slow
def test_an_option_of_another_sampler_is_refused(tmp_path: Path) -> None:
    """The folder's own eta goes with its own sampler; one that was asked for is not dropped without a word."""
    result = fastdiff("sample", "-n", 1, "--sampler", "ddpm", "--steps", 2, "--eta", 0.5, cwd=tmp_path)
    assert result.returncode == 2
    assert "sampler='ddpm' does not take eta" in result.stderr
    assert fastdiff("sample", "-n", 1, "--sampler", "ddpm", "--steps", 2, cwd=tmp_path).returncode == 0


# ---- plans


@pytest.fixture(scope="module")
def digits() -> object:
    return models.digits()


def rows_of(plan: Plan) -> list[str]:
    return [repr(row) for row in plan]


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_plan_prints_every_sampler(name: str) -> None:
    result = run("plan", "--sampler", name, "--steps", 6)
    assert result.exit_code == 0, result.output
    assert result.output == f"{samplers.SAMPLERS[name](NoiseSchedule.linear(), 6)}\n"


def test_plan_takes_the_sampler_s_options(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    arguments = ("--steps", 9, "--schedule", "flow", "--spacing", "linspace", "--prediction", "flow_prediction")
    options = ("--option", "order=3", "--option", "lower-order-final=False", "--option", "disable_corrector=0,2")
    result = run("plan", "--sampler", "unipc", *arguments, *options, "--option", "solver_type=bh1", "--json", file)
    assert result.exit_code == 0, result.output
    expected = samplers.unipc(
        FlowSchedule(), 9, spacing="linspace", prediction="flow_prediction", order=3, lower_order_final=False,
        disable_corrector=(0, 2), solver_type="bh1",
    )  # fmt: skip
    assert rows_of(Plan.load(file)) == rows_of(expected)
    assert str(file) in result.output
    eta = run("plan", "--sampler", "ddim", "--steps", 5, "--eta", 0.5, "--spacing", "karras", "--json", file)
    assert eta.exit_code == 0, eta.output
    assert rows_of(Plan.load(file)) == rows_of(samplers.ddim(NoiseSchedule.linear(), 5, eta=0.5, spacing="karras"))


def test_plan_reads_a_model_s_schedule(tmp_path: Path) -> None:
    folder = Path(models.__file__).parents[1] / "assets" / "digits"
    file = tmp_path / "plan.json"
    assert run("plan", "--sampler", "ddpm", "--steps", 5, "--schedule", folder, "--json", file).exit_code == 0
    assert rows_of(Plan.load(file)) == rows_of(samplers.ddpm(NoiseSchedule.cosine(), 5))


def test_plan_reads_a_flow_s_folder(tmp_path: Path) -> None:
    """The schedule that the config is, what its network predicts, and the tokens where the shift needs them."""
    (tmp_path / "scheduler").mkdir()
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    file = tmp_path / "plan.json"
    made = ("plan", "--sampler", "euler", "--steps", 5, "--schedule", tmp_path)
    assert run(*made, "--json", file).exit_code == 0
    assert rows_of(Plan.load(file)) == rows_of(samplers.euler(FlowSchedule(3.0), 5, prediction="flow_prediction"))
    config["use_dynamic_shifting"] = True
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    refused = run(*made)
    assert refused.exit_code == 2
    assert "tokens" in refused.output
    assert run(*made, "--tokens", 1024, "--json", file).exit_code == 0
    expected = samplers.euler(FlowSchedule.for_tokens(1024), 5, prediction="flow_prediction")
    assert rows_of(Plan.load(file)) == rows_of(expected)
    config["_class_name"] = "IPNDMScheduler"
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert "IPNDMScheduler" in run(*made).output
    assert run("plan", "--sampler", "euler", "--tokens", 5).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [("--sampler", "dpmpp_2m_sde", "--steps", 20), ("--sampler", "ddpm"),
     ("--sampler", "heun", "--schedule", "edm", "--steps", 12, "--option", "s_churn=9"),
     ("--sampler", "unipc", "--schedule", "flow", "--steps", 1, "--prediction", "flow_prediction")],
)  # fmt: skip
@pytest.mark.slow
def test_plan_plots(arguments: tuple[object, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("plan", *arguments, "--plot", tmp_path / "plan.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == picture.height == 880
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # lines of several colours, not an empty page
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


def test_a_plan_is_run_as_it_was_made(tmp_path: Path) -> None:
    arguments = ("sample", "-n", 3, "--seed", 5, "--guidance", 2.0)
    folder = Path(models.__file__).parents[1] / "assets" / "digits"
    made = ("--sampler", "dpmpp_2m", "--steps", 6, "--schedule", folder, "--spacing", "leading", "--option", "clip=1.0")
    assert run("plan", *made, "--json", tmp_path / "plan.json").exit_code == 0
    by_plan = run(*arguments, "--plan", tmp_path / "plan.json", "--out", tmp_path / "a.png")
    by_name = run(*arguments, "--sampler", "dpmpp_2m", "--steps", 6, "--out", tmp_path / "b.png")
    assert (by_plan.exit_code, by_name.exit_code) == (0, 0), by_plan.output + by_name.output
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_sample_takes_every_sampler(name: str, tmp_path: Path, digits: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.models.digits", lambda: digits)
    result = run("sample", "-n", 1, "--sampler", name, "--steps", 3, "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.png").exists()


def test_eta_is_not_ignored(tmp_path: Path) -> None:
    """The model's folder has an η for DDIM, which other samplers are spared; one that is asked for is not."""
    pictures = []
    for eta in ((), ("--eta", 0.0), ("--eta", 1.0)):
        made = run("sample", "-n", 1, "--sampler", "euler_ancestral", "--steps", 4, *eta, "--out", tmp_path / "a.png")
        assert made.exit_code == 0, made.output
        pictures.append((tmp_path / "a.png").read_bytes())
    assert pictures[0] == pictures[2] != pictures[1]
    refused = run("sample", "-n", 1, "--sampler", "heun", "--steps", 4, "--eta", 0.5, "--out", tmp_path / "b.png")
    assert refused.exit_code == 2
    assert "does not take eta" in refused.output


BAD_PLANS = [
    (("--sampler", "dpmp_2m"), "did you mean 'dpmpp_2m'?"),
    (("--sampler", "ddpm", "--schedule", "liner"), "schedule is 'liner'"),
    (("--sampler", "ddim", "--spacing", "traling"), "did you mean 'trailing'?"),
    (("--sampler", "ddim", "--prediction", "epsilom"), "prediction is 'epsilom'"),
    (("--sampler", "ddim", "--steps", 1001), "1001"),
    (("--sampler", "ddim", "--eta", 1.5), "eta must be in [0, 1]"),
    (("--sampler", "euler", "--eta", 0.5), "does not take eta"),
    (("--sampler", "lms", "--option", "order"), "NAME=VALUE; got 'order'"),
    (("--sampler", "lms", "--option", "=3"), "NAME=VALUE"),
    (("--sampler", "lms", "--option", "ordr=3"), "does not take ordr"),
    (("--sampler", "lms", "--option", "order=9"), "order must be"),
    (("--sampler", "lms", "--option", "order=three"), "order must be"),
    (("--sampler", "lms", "--option", "order=3", "--option", "order=2"), "order twice"),
    (("--sampler", "ddpm", "--schedule", "edm"), "steps must be given"),
    (("--sampler", "ddim", "--plot", "plan.pdf"), "must end in .png"),
    (("--sampler", "ddim", "--json", "plan.txt"), "must end in .json"),
    (("--sampler", "ddim", "--json", "no/such/plan.json"), "does not exist"),
    (("--sampler", "ddim", "--schedule", "."), "scheduler_config.json"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_PLANS)
def test_bad_plans_are_one_line(
    arguments: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("plan", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, (), "plan.json"),
        ("{}", (), "not a plan's JSON"),
        ("good", ("--steps", 5), "--plan goes without --steps"),
        ("good", ("--sampler", "ddim", "--eta", 0.5), "--plan goes without --sampler, --eta"),
    ],
)
def test_bad_plan_files_are_one_line(
    content: str | None, arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(samplers.ddim(NoiseSchedule.cosine(), 4).to_json() if content == "good" else content)
    result = run("sample", "-n", 1, "--plan", file, *arguments, "--out", tmp_path / "a.png")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "a.png").exists()


def test_a_plot_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("plan", "--sampler", "ddim", "--steps", 5, "--plot", tmp_path / "plan.png")
    assert result.exit_code == 1  # it was asked rightly
    assert 'pip install "fastdiff-torch[plot]"' in result.output
    assert list(tmp_path.iterdir()) == []


def test_labels_are_on_the_cpu_whatever_the_default_device() -> None:
    torch.set_default_device("meta")
    try:
        made = [labels_of(["a", "b"], None, 3, 1), labels_of(["a", "b"], "b", 3, 0)]
    finally:
        torch.set_default_device(None)
    assert [labels.tolist() for labels in made] == [[1, 0, 1], [1, 1, 1]]


def test_version_and_shell_completion() -> None:
    version = run("--version")
    assert (version.exit_code, version.output) == (0, f"fastdiff {package.__version__}\n")
    shown = run("--help").output
    assert "--install-completion" in shown
    assert "--install-completion" not in run("sample", "--help").output


def test_what_fails_though_it_was_asked_rightly_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "cannot write it: No space left on device")

    monkeypatch.setattr("fastdiff.images.save_grid", full)
    result = run("sample", "-n", 1, "--steps", 1, "--out", tmp_path / "a.png")
    assert result.exit_code == 1, result.output
    assert "No space left on device" in result.output

    def astray(*_: object, **__: object) -> None:
        raise FloatingPointError("NaN in row 0")

    monkeypatch.setattr("fastdiff.pictures.recipe.sample", astray)
    result = run("sample", "-n", 1, "--steps", 1, "--out", tmp_path / "a.png")
    assert (result.exit_code, result.output) == (1, "error: NaN in row 0\n")


def test_warnings_are_told_in_words() -> None:
    result = run("plan", "--sampler", "ddim", "--steps", 5)
    assert "warning" not in result.output

    def warned() -> None:
        warnings.warn("beware", stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    app = typer.Typer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(command.__globals__, "app", app)
        command(warned)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = CliRunner().invoke(app, [])
    assert result.stderr == "warning: beware\nwarning (DeprecationWarning): old\n"


def test_quiet_says_nothing_and_threads_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    sample = package.sample
    monkeypatch.setattr(
        "fastdiff.pictures.recipe.sample",
        lambda *args, **more: seen.append(torch.get_num_threads()) or sample(*args, **more),
    )
    result = run("sample", "-n", 3, "--batch-size", 2, "--steps", 1, "-q", "--threads", 2, "--out", tmp_path / "a.png")
    assert (result.exit_code, result.output) == (0, "")
    assert (seen, torch.get_num_threads()) == ([2, 2], before)


# ---- sample takes what Python has


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A wide picture in colour, which is cropped, resized and made grey."""
    path = tmp_path / "in.png"
    colours = torch.linspace(0, 255, 40 * 24 * 3).view(24, 40, 3).to(torch.uint8)
    Image.fromarray(colours.numpy()).save(path)
    return path


def drawn(path: Path, number: int) -> list[bytes]:
    """The images of a row, as bytes; 8 pixels enlarged eight times, and a gap of one."""
    with Image.open(path) as opened:
        return [opened.crop((i * 72, 0, i * 72 + 64, 64)).tobytes() for i in range(number)]


def cell(image: torch.Tensor) -> bytes:
    return make_grid(image[None]).tobytes()


def test_sample_passes_its_options_on(tmp_path: Path, digits: models.trained.TrainedModel) -> None:
    made = run("sample", "-n", 2, "--sampler", "dpmpp_2m", "--steps", 4, "--spacing", "karras", "--clip", "none",
               "--option", "lower-order-final=False", "--schedule", "linear", "--class", "3", "--guidance", 1,
               "--out", tmp_path / "a.png")  # fmt: skip
    assert made.exit_code == 0, made.output
    images = package.sample(
        digits.unet, (2, 1, 8, 8), sampler="dpmpp_2m", steps=4, spacing="karras",
        sampler_options={"lower_order_final": False}, model_kwargs={"class_labels": torch.tensor([3, 3])},
    )  # fmt: skip
    assert drawn(tmp_path / "a.png", 2) == [cell(image) for image in images]


def test_image_to_image(tmp_path: Path, picture: Path, digits: models.trained.TrainedModel) -> None:
    common = ("sample", "-n", 2, "--image", picture, "--out", tmp_path / "a.png", "--seed", 4)
    assert run(*common, "--strength", 0).exit_code == 0
    start = read_picture(picture, (8, 8), grey=True).float()[None] / 127.5 - 1
    assert drawn(tmp_path / "a.png", 2) == [cell(start[0])] * 2
    assert run(*common, "--steps", 5).exit_code == 0
    labels = torch.tensor([0, 1])
    images = package.sample(
        digits.unet, (2, 1, 8, 8), seed=4, x_init=start.expand(2, 1, 8, 8), strength=0.6,
        **digits.arguments(labels, steps=5),
    )  # fmt: skip
    assert drawn(tmp_path / "a.png", 2) == [cell(image) for image in images]


def test_inpainting_keeps_what_is_white(tmp_path: Path, picture: Path) -> None:
    mask = Image.new("L", (8, 8), "black")
    mask.paste("white", (0, 0, 4, 8))
    mask.save(tmp_path / "mask.png")
    made = run("sample", "-n", 2, "--image", picture, "--mask", tmp_path / "mask.png", "--steps", 4,
               "--out", tmp_path / "a.png")  # fmt: skip
    assert made.exit_code == 0, made.output
    known = make_grid((read_picture(picture, (8, 8), grey=True).float() / 127.5 - 1)[None])
    with Image.open(tmp_path / "a.png") as opened:
        for left in (0, 72):
            half = opened.crop((left, 0, left + 32, 64))
            assert half.tobytes() == known.crop((0, 0, 32, 64)).tobytes()
            other = opened.crop((left + 32, 0, left + 64, 64))
            assert other.tobytes() != known.crop((32, 0, 64, 64)).tobytes()


def test_images_between_two_pictures(tmp_path: Path, picture: Path, digits: models.trained.TrainedModel) -> None:
    Image.new("L", (8, 8), 30).save(tmp_path / "b.png")
    made = run("sample", "--interpolate", picture, tmp_path / "b.png", "--class", "3", "--out", tmp_path / "a.png")
    assert made.exit_code == 0, made.output
    assert "9 images" in made.output
    a, b = (read_picture(p, (8, 8), grey=True).float() / 127.5 - 1 for p in (picture, tmp_path / "b.png"))
    told = digits.arguments(torch.full((9,), 3))
    told = {name: told[name] for name in told if name not in ("sampler", "steps", "eta", "spacing")}
    images = package.interpolate(digits.unet, a, b, [i / 8 for i in range(9)], **told)
    assert drawn(tmp_path / "a.png", 9) == [cell(image) for image in images]
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.size == (9 * 72 - 8, 64)  # one row


def test_small_networks_are_left_alone_and_large_ones_accelerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    sample = package.sample

    def looked(model: torch.nn.Module, *args: object, **more: object) -> torch.Tensor:
        seen.append(is_accelerated(model))
        return sample(model, *args, **more)

    monkeypatch.setattr("fastdiff.pictures.recipe.sample", looked)
    common = ("sample", "-n", 1, "--steps", 1, "--out", tmp_path / "a.png")
    for more in ((), ("--accelerate", "on"), ("--accelerate", "off")):
        assert run(*common, *more).exit_code == 0
    monkeypatch.setattr("fastdiff.acceleration.worthwhile.PARAMETERS", 700_000)
    for more in ((), ("--accelerate", "off"), ("--dtype", "bfloat16")):
        assert run(*common, *more).exit_code == 0
    assert seen == [False, True, False, True, False, True]


def test_a_film_holds_few_frames_however_long_it_is() -> None:
    """The first and the last state, and evenly spaced ones between; those that are not shown are let go."""
    alive = weakref.WeakSet()

    def states(count: int) -> Iterator[State]:
        for row in range(count):
            x = torch.full((1,), float(row))
            alive.add(x)
            most.append(len(alive))
            yield State(x=x, x0=None, anchor=None, slots=(), row=row)

    for count in (1, 2, 51, 60, 61, 62, 63, 1001, 997):
        most: list[int] = []
        frames, last = film(states(count))
        rows = [int(frame.x) for frame in frames]
        assert (rows[0], rows[-1], int(last)) == (0, count - 1, count - 1)
        assert len(frames) == count if count <= 60 else 30 <= len(frames) <= 61
        assert len(set(np.diff(rows)[:-1])) <= 1
        assert max(most) <= 63
        del frames, last


# ---- train


def test_train_names_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.training.keep.GRID_STEPS", 1)
    for name in ("red ant", "bee"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "in" / name / "1.png")
    (tmp_path / "in" / "bee" / "2.png").write_bytes(b"broken")
    common = ("train", "--data", tmp_path / "in", "--steps", 1, "--size", 8, "--channels", "8,8", "--batch-size", 2)
    refused = run(*common, "--out", tmp_path / "a b")
    assert refused.exit_code == 2
    assert "2.png" in refused.output
    made = run(*common, "--out", tmp_path / "a b", "--skip-broken", "--flip", "--timesteps", 30)
    assert made.exit_code == 0, made.output
    assert f"warning: 1 of 3 pictures in {tmp_path / 'in'} were left out" in made.stderr
    first, second = made.stdout.splitlines()
    assert first.endswith("step-000001.png: samples, a row each of bee, red ant")
    assert second.endswith(f"fastdiff sample --model '{tmp_path}/a b' --class bee")
    assert run(*common, "--out", tmp_path / "a b", "--skip-broken").exit_code == 2
    again = run(*common, "--out", tmp_path / "a b", "--skip-broken", "--overwrite", "--quiet")
    assert (again.exit_code, again.stdout) == (0, "")
    sampled = run("sample", "--model", tmp_path / "a b", "--class", "red ant", "-n", 1, "--steps", 2, "--sampler",
                  "ddim", "--out", tmp_path / "a.png")  # fmt: skip
    assert sampled.exit_code == 0, sampled.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Run.train_step

    def second(run: Run) -> torch.Tensor:
        if run.step == 1:
            os.kill(os.getpid(), number)
        return step(run)

    monkeypatch.setattr(Run, "train_step", second)
    out = tmp_path / "model"
    result = run("train", "--data", "digits", "--out", out, "--steps", 9, "--channels", "8,8", "--batch-size", 2, "-q")
    assert result.exit_code == 128 + number
    told = f"interrupted at step 2 of 9; {out} holds step 2: the same command with --resume goes on\n"
    assert result.output == told
