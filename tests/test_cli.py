"""The command line, as a user runs it: pictures, messages, exit codes, and nothing half written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastdiff import FlowSchedule, NoiseSchedule, Plan, cli, models, samplers
from fastdiff.cli.arguments import labels_of

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}


def fastdiff(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastdiff", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def run(*arguments: object):
    """The same in this process, which spares the start of Python."""
    return CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, list(map(str, arguments)))


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
        (("train", "--data", "nowhere", "--out", "model"), "nowhere"),
        (("train", "--data", "digits", "--out", "model", "--steps", "0"), "steps"),
        (("train", "--data", "digits", "--out", "model", "--channels", "wide"), "channels"),
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
    """The schedule that the config is, with what its network predicts; the image's tokens where the shift needs them."""
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
    assert result.exit_code == 2
    assert 'pip install "fastdiff-torch[plot]"' in result.output
    assert list(tmp_path.iterdir()) == []


def test_labels_are_on_the_cpu_whatever_the_default_device() -> None:
    torch.set_default_device("meta")
    try:
        made = [labels_of(["a", "b"], None, 3, 1), labels_of(["a", "b"], "b", 3, 0)]
    finally:
        torch.set_default_device(None)
    assert [labels.tolist() for labels in made] == [[1, 0, 1], [1, 1, 1]]
