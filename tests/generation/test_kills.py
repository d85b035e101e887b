"""A set whose processes are killed at any moment, and that two jobs make at once: in the end each image once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.generation.verify import verify

KILLS = int(os.environ.get("FASTDIFF_TEST_KILLS", "4"))
NUM = 48
OPTIONS = {"steps": 1, "shard_size": 8, "batch_size": 2, "guidance_scale": 1.0, "device": "cpu"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")]


def child(out: str, rank: int, world: int, format: str) -> None:
    torch.set_num_threads(1)
    fastdiff.generate(None, NUM, out, rank=rank, world_size=world, format=format, **OPTIONS)


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastdiff.generation.generate", "PIL.PngImagePlugin"])
    return context


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run's folder, its SHA-256, and how long it took."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out, began = tmp_path_factory.mktemp("straight") / "set", time.monotonic()
    made = fastdiff.generate(None, NUM, out, **OPTIONS)
    torch.set_num_threads(threads)
    return out, made.sha256, time.monotonic() - began


def start(context, out, world=1, format="tar"):
    processes = [context.Process(target=child, args=(str(out), rank, world, format)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def ended(processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(("world", "format"), [(1, "tar"), (2, "tar"), (1, "png")])
def test_kills_at_random_moments(tmp_path, context, straight, rng, world, format):
    folder, sha256, seconds = straight
    kills, out = 0, tmp_path / "set"
    while kills < KILLS:
        processes = start(context, out, world, format)
        time.sleep(rng.random() * seconds)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        if ended(processes) == [0] * world:  # it was faster
            assert verify(out).sha256 == sha256
            out = tmp_path / f"set-{kills}-{time.monotonic_ns()}"
        elif out.exists() and (out / "job.json").exists():
            assert verify(out).damaged == {}
    assert ended(start(context, out, world, format)) == [0] * world
    found = verify(out)
    assert (found.missing, found.damaged, found.sha256) == ((), {}, sha256)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["job.json", "manifest.jsonl", *(f"shard-{i:06d}{'.tar' * (format == 'tar')}" for i in range(NUM // 8))]
    )
    if format == "tar":
        for path in folder.glob("shard-*"):
            assert (out / path.name).read_bytes() == path.read_bytes()


def test_two_whole_jobs_at_once_are_one_set(tmp_path, context, straight):
    out = tmp_path / "set"
    processes = start(context, out) + start(context, out)
    assert ended(processes) == [0, 0]
    assert verify(out).sha256 == straight[1]
    assert not (out / ".unfinished").exists()


def test_a_process_that_hangs_is_done_without(tmp_path, context, straight):
    """Of two processes one stops for ever, with a part of its share made; the other makes the rest."""
    out = tmp_path / "set"
    hung, other = start(context, out, world=2)
    while not (out / ".unfinished").exists():
        time.sleep(0.01)
    os.kill(hung.pid, signal.SIGSTOP)
    try:
        other.join(120)
        assert other.exitcode == 0
        assert verify(out).sha256 == straight[1]
    finally:
        os.kill(hung.pid, signal.SIGKILL)
        hung.join()


def test_no_process_outlives_the_launcher(tmp_path):
    """torchrun's workers are left over where it is killed; ours end with the batch that they are making."""
    out = tmp_path / "set"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--master-port=0", "-m", "fastdiff",
               "generate", "-n", "100000", "--out", str(out), "--steps", "1", "--shard-size", "8", "--batch-size", "2",
               "--device", "cpu", "--quiet"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not list(out.glob("shard-*")):
            assert launcher.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        launcher.kill()
        launcher.wait()
    for _ in range(100):
        before = sorted(out.rglob("*"))
        time.sleep(1)
        if sorted(out.rglob("*")) == before:
            break
    else:
        pytest.fail("the worker goes on")
    assert verify(out).damaged == {}
