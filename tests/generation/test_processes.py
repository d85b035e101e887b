"""A set made by several processes that one command starts: shares, signals, deaths, and what is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import run

import fastdiff
from fastdiff.generation.processes import devices_of
from fastdiff.generation.shares import Share
from fastdiff.generation.verify import verify
from fastdiff.ops.native import cpu_threads

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"steps": 1, "shard_size": 8, "batch_size": 2, "guidance_scale": 1.0, "device": "cpu"}

needs_processes = pytest.mark.skipif(not Path("/proc").exists(), reason="finds children by /proc")


def children(parent):
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(place.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


def workers_of(parent):
    """The processes that make images, not multiprocessing's own tracker of resources."""
    return [pid for pid in children(parent) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


STARTED = []


@pytest.fixture(autouse=True)
def none_left():
    """A test that fails leaves no process behind."""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def start(out, num, *more):
    command = [sys.executable, "-m", "fastdiff", "generate", "-n", str(num), "--out", str(out), "--steps", "1",
               "--shard-size", "8", "--batch-size", "2", "--guidance", "1", "--device", "cpu", "--workers", "2",
               *more]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    STARTED.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return STARTED[-1]


def until(condition, process):
    end = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_two_processes_make_one_set(tmp_path):
    with cpu_threads(1):  # a recipe says how many threads there were
        alone = fastdiff.generate(None, 48, tmp_path / "alone", **SMALL)
    with cpu_threads(2):  # one for each process
        made = fastdiff.generate(None, 48, tmp_path / "set", workers=2, **SMALL)
    assert (made.made, made.failed, made.sha256) == (48, {}, alone.sha256)
    for path in (tmp_path / "alone").glob("shard-*"):
        assert (tmp_path / "set" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "set" / ".unfinished").exists()


@pytest.mark.slow
@needs_processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_and_what_is_made_is_kept(tmp_path, number):
    out = tmp_path / "set"
    launcher = start(out, 100_000)
    until(lambda: list(out.glob("shard-*")), launcher)
    workers = workers_of(launcher.pid)
    assert len(workers) == 2
    launcher.send_signal(number)
    assert launcher.wait(120) == 75
    assert "the same command goes on" in launcher.stderr.read()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert verify(out).damaged == {}


@pytest.mark.slow
@needs_processes
def test_what_a_dead_process_leaves_is_made_by_the_other(tmp_path):
    out = tmp_path / "set"
    launcher = start(out, 400)
    until(lambda: list(out.glob(".unfinished/shard-*")) and len(workers_of(launcher.pid)) == 2, launcher)
    os.kill(workers_of(launcher.pid)[0], signal.SIGKILL)
    assert launcher.wait(300) == 0, launcher.stderr.read()
    found = verify(out)
    assert (found.right, found.num) == (True, 400)


@pytest.mark.slow
@needs_processes
def test_no_process_outlives_a_killed_launcher(tmp_path):
    out = tmp_path / "set"
    launcher = start(out, 100_000)
    until(lambda: list(out.glob("shard-*")), launcher)
    workers = workers_of(launcher.pid)
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
              for pid in workers):  # fmt: skip
        assert time.monotonic() < end
        time.sleep(0.1)
    assert verify(out).damaged == {}


@pytest.mark.slow
@needs_processes
def test_all_processes_dead_is_said(tmp_path):
    out = tmp_path / "set"
    launcher = start(out, 100_000)
    until(lambda: list(out.glob("shard-*")), launcher)
    for pid in workers_of(launcher.pid):
        os.kill(pid, signal.SIGKILL)
    assert launcher.wait(120) == 1
    assert "all processes have ended (exit code -9, exit code -9): the same command goes on" in launcher.stderr.read()


def test_a_process_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of(None, "all", "auto") == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices_of(None, 2, "cuda") == ["cuda:0", "cuda:1"]
    assert devices_of(2, None, "cpu") == ["cpu", "cpu"]
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"gpus is {wrong}, and this machine has 3"):
            devices_of(None, wrong, "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="gpus is all, and this machine has 0 that torch can use"):
        devices_of(None, "all", "auto")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"workers": 0}, "workers must be in"),
        ({"workers": 2, "gpus": 1}, "workers and gpus exclude each other"),
        ({"gpus": "some"}, "gpus must be a number, or all; got 'some'"),
        ({"gpus": -1}, "gpus must be in"),
        ({"gpus": "all", "device": "cpu"}, "gpus goes with device auto or cuda; got 'cpu'"),
        ({"workers": 2, "dry_run": True}, "dry_run makes one batch in this process"),
        ({"workers": 2, "model": fastdiff.models.digits()}, "each loads the model: give its folder"),
        ({"engine": "dask"}, "engine must be ray, or None"),
        ({"engine": "ray", "rank": 0, "world_size": 2}, "rank and world_size go without Ray"),
        ({"workers": 2, "guidance_scale": lambda level: 1.0}, "one cannot be pickled"),
        ({"workers": 2, "seed": -1}, "seed"),
        ({"workers": 2, "steps": 0}, "steps"),
    ],
)
def test_what_is_refused_before_any_process_starts(tmp_path, monkeypatch, wrong, told):
    monkeypatch.setattr("multiprocessing.get_context", lambda *_: pytest.fail("a process is started"))
    asked = {**SMALL, "model": None, **wrong}
    with pytest.raises((ValueError, TypeError), match=told):
        fastdiff.generate(asked.pop("model"), 8, tmp_path / "set", **asked)
    assert not (tmp_path / "set").exists()


def test_the_command_line_hands_them_on(tmp_path):
    done = run("generate", "-n", 8, "--out", tmp_path / "set", "--gpus", "2", "--workers", 1)
    assert done.exit_code == 2
    assert "workers and gpus exclude each other" in done.output
    done = run("generate", "--out", tmp_path / "set")
    assert done.exit_code == 2
    assert "num must be given" in done.output


def test_a_share_is_divided():
    """What a node of several makes is divided among its own processes, whose shares are all of it."""
    shares = [Share(node * 2 + i, 3 * 2) for node in range(3) for i in range(2)]
    assert [shard for share in shares for shard in share.own(20)] == list(range(20))
