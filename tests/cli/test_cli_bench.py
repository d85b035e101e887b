"""``fastdiff bench``: what it runs is right, and what it prints are its numbers. No test asserts a time."""

import pytest
import torch
from helpers import run

import fastdiff
from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule, samplers
from fastdiff.cli import bench as module
from fastdiff.cli.bench import interleaved, plain_loop, table


def test_every_contender_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("bench", "--steps", 2, "--rounds", 2, "--batch-size", 3)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "UNet of 702,753 parameters, batch [3, 1, 8, 8], 2 steps of ddim"
    assert f"torch {torch.__version__}" in lines[1]
    names = [line.partition("  ")[0] for line in lines[3:]]
    assert names[:3] == ["plain PyTorch", "fastdiff.sample", "accelerated, float32"]
    assert [float(line.split()[-1]) < 1e-4 for line in lines[3:6]] == [True] * 3


def test_quiet_leaves_the_table_and_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    done = run("bench", "--steps", 1, "--rounds", 1, "--batch-size", 1, "--quiet", "--threads", before + 1)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f", threads {before + 1}," in done.stdout.splitlines()[1]
    assert torch.get_num_threads() == before


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "plain_loop", lambda network, x, plan, more: x)
    monkeypatch.setattr(module, "interleaved", None)
    done = run("bench", "--steps", 1, "--rounds", 1, "--batch-size", 1)
    assert done.exit_code == 1
    assert "fastdiff.sample: its images differ from plain PyTorch's by " in done.stdout
    assert "plain PyTorch: its" not in done.stdout


@pytest.mark.parametrize(
    "plan",
    [
        samplers.ddim(NoiseSchedule.cosine(), 5, clip=1.0),
        samplers.ddim(NoiseSchedule.linear(), 5, prediction="v_prediction"),
        samplers.euler(FlowSchedule(3.0), 5, prediction="flow_prediction"),
        samplers.euler(EDMSchedule(), 5, prediction="edm"),
    ],
    ids=lambda plan: plan.name,
)
def test_the_plain_loop_is_the_plan(plan: fastdiff.Plan) -> None:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([x * 0.3 + t.view(-1, 1, 1, 1) * 1e-4, x], dim=1)  # the second half: a variance, not used

    x = plan.init_sigma * fastdiff.randn((2, 3, 4, 4))
    expected = fastdiff.sample(lambda x, t: network(x, t)[:, :3], (2, 3, 4, 4), sampler=plan)
    torch.testing.assert_close(plain_loop(network, x, plan, {}), expected, rtol=1e-5, atol=1e-5)


def test_contenders_take_turns() -> None:
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(runs, 2, torch.device("cpu"), lambda: None)
    assert order == list("abcabc")
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_the_table_s_numbers() -> None:
    text = table({"plain": [0.2, 0.1, 0.3], "fast": [0.05, 0.1, 0.04]}, {"plain": 0.0, "fast": 2e-7}, 8, 10)
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["ms a step", "from … to", "images/s at 10 steps", "times as fast", "error"]
    assert cells[1] == ["plain", "20", "10 … 30", "40", "1.00", "0"]
    assert cells[2] == ["fast", "5", "4 … 10", "160", "4.00", "2e-07"]
