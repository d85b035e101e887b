"""A set made in several processes of this machine: one a GPU, or so many on its cores."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fastdiff.checks import check_int
from fastdiff.generation.job import Folder, Job
from fastdiff.generation.progress import Bar
from fastdiff.generation.request import Request, prepared
from fastdiff.generation.run import claimed, with_progress
from fastdiff.generation.shares import MOST, Share
from fastdiff.generation.worker import Worker
from fastdiff.ops.native import cpu_threads
from fastdiff.training.signals import Interrupted, Signals

PATIENCE = 1.0  # seconds between looks at the signals


def check_launch(
    workers: int | None, gpus: int | str | None, engine: str | None, asked: Request, *, dry_run: bool, shared: bool
) -> None:
    """That what says how many processes there are goes together; ValueError, TypeError.

    shared: a rank or a number of processes is given beside.
    """
    if engine not in (None, "ray"):
        raise ValueError(f"engine must be ray, or None for processes of this machine; got {engine!r}")
    if workers is not None:
        check_int("workers", workers, 1, MOST)
    if gpus is not None and gpus != "all":
        if isinstance(gpus, str):
            raise ValueError(f"gpus must be a number, or all; got {gpus!r}")
        check_int("gpus", gpus, 1, MOST)
    several = workers is not None or gpus is not None or engine is not None
    if workers is not None and gpus is not None:
        raise ValueError("workers and gpus exclude each other: there is a process for each GPU")
    if several and dry_run:
        raise ValueError("dry_run makes one batch in this process: leave workers, gpus and engine out")
    if several and not (asked.model is None or isinstance(asked.model, (str, os.PathLike))):
        raise TypeError(
            f"of several processes each loads the model: give its folder, not a {type(asked.model).__name__}"
        )
    if engine is not None and shared:
        raise ValueError("rank and world_size go without Ray, which hands the shards out")
    if gpus is not None and asked.device not in ("auto", "cuda"):
        raise ValueError(f"gpus goes with device auto or cuda; got {asked.device!r}")


def devices_of(workers: int | None, gpus: int | str | None, device: str) -> list[str]:
    """The device of each process."""
    if gpus is None:
        return [device] * (workers or 1)
    found = torch.cuda.device_count()
    count = found if gpus == "all" else int(gpus)
    if not 1 <= count <= found:
        raise ValueError(f"gpus is {gpus}, and this machine has {found} that torch can use")
    return [f"cuda:{i}" for i in range(count)]


def in_processes(
    asked: Request, share: Share, workers: int | None, gpus: int | str | None, progress: bool
) -> tuple[Folder, Job, dict[int, str]]:
    """Make what is missing in a process a device, of this process's share; of each failed shard, why.

    A process that dies costs its batch: the others make its part. One that fails otherwise (it finds no memory, say)
    ends with a message. Raises Interrupted, and RuntimeError where all have ended and shards are missing.
    """
    devices = devices_of(workers, gpus, asked.device)
    try:
        pickle.dumps(asked)
    except Exception as error:
        raise TypeError(
            f"of several processes each is told the arguments, and one cannot be pickled: {error}"
        ) from None
    with Signals() as signals:
        with prepared(replace(asked, device="cpu"), signals, look_for_batch=False) as ready:  # what is wrong, told once
            folder, job = ready.folder, ready.job
        del ready  # the model: each process has its own
        if len(folder.published(job)) == job.shards:
            return folder, job, {}
        signals.at_once = False
        threads = max(1, torch.get_num_threads() // len(devices))
        with Bar(folder, job, progress) as bar, started(asked, share, devices, threads) as children:
            failed, ended = _watched(children, bar, signals)
        if signals.asked is not None:
            raise with_progress(Interrupted("interrupted", signals.asked), folder, job)
    if not failed and len(folder.published(job)) < job.shards:
        raise RuntimeError(f"{folder.path}: shards are missing, and all processes have ended ({ended}): "
                           "the same command goes on")  # fmt: skip
    return folder, job, failed


@contextmanager
def started(
    asked: Request, share: Share, devices: list[str], threads: int
) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """The processes, and of each where it tells what it has made; none is left at the end."""
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    children: list[tuple[BaseProcess, Connection]] = []
    try:
        for i, device in enumerate(devices):
            here, there = context.Pipe(duplex=False)
            of_child = Share(share.rank * len(devices) + i, share.world * len(devices))
            arguments = (replace(asked, device=device), of_child, threads, os.getpid(), there)
            child = context.Process(target=_child, args=arguments, name=f"fastdiff-{i}")
            child.start()
            there.close()
            children.append((child, here))
        yield children
    finally:
        for process, _ in children:
            process.terminate()
        for process, here in children:
            process.join()
            here.close()


def _watched(children: list[tuple[BaseProcess, Connection]], bar: Bar, signals: Signals) -> tuple[dict[int, str], str]:
    """Wait for the end of all; what failed, and how each process ended. A signal is handed on to each, once."""
    failed: dict[int, str] = {}
    open_, handed_on = {here: child for child, here in children}, False
    while open_:
        if signals.asked is not None and not handed_on:
            handed_on = True
            for child, _ in children:
                child.terminate()  # SIGTERM: it ends its batch
        for here in wait(list(open_), PATIENCE):
            assert isinstance(here, Connection)
            try:
                shard, told_of = here.recv()
            except (EOFError, OSError):
                del open_[here]
                continue
            if isinstance(told_of, int):
                bar.advanced(shard, told_of)
            else:
                failed[shard] = told_of
    for child, _ in children:
        child.join()
    return failed, ", ".join(f"exit code {child.exitcode}" for child, _ in children)


def _child(asked: Request, share: Share, threads: int, parent: int, tell: Connection) -> None:
    """One process: its share first, then what is missing of the others'."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all: the parent hands it on, once

    def advanced(shard: int, images: int) -> None:
        _send(tell, shard, images)

    try:
        with cpu_threads(threads), Signals() as signals, prepared(asked, signals) as ready:
            job = claimed(ready, asked)
            signals.at_once = False
            worker = Worker(ready.folder, job, ready.model, ready.given, share, signals, advanced, parent)
            worker.run()
            for shard, why in worker.failed.items():
                _send(tell, shard, why)
    except Interrupted:
        raise SystemExit(75) from None  # as the command line ends
    except Exception as error:
        print(f"error in process {share.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _send(tell: Connection, shard: int, what: Any) -> None:
    try:
        tell.send((shard, what))
    except OSError:  # the parent has ended; this process sees it before its next batch
        return
