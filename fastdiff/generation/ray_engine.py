"""A set made by actors of a Ray cluster, each of which holds the model; the driver hands them the missing shards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fastdiff.generation.job import Folder, Job
from fastdiff.generation.progress import Bar
from fastdiff.generation.request import Request, prepared
from fastdiff.generation.run import claimed, with_progress
from fastdiff.generation.shares import Share
from fastdiff.generation.worker import Worker
from fastdiff.ops.native import cpu_threads
from fastdiff.training.signals import Interrupted, Signals

PATIENCE = 1.0  # seconds between looks at the signals and at the cluster
TRIES = 3  # of a shard, or of an actor's start, that ends with the actor's death
INTERRUPTED = "interrupted"


class Maker:
    """An actor: it loads the model once, makes the shards that it is given, and publishes each itself."""

    def __init__(self, asked: Request) -> None:
        self._signals, self._stack = Signals(), ExitStack()
        self._stack.enter_context(cpu_threads(1))
        ready = self._stack.enter_context(prepared(asked, self._signals))
        job = claimed(ready, asked)
        self._worker = Worker(ready.folder, job, ready.model, ready.given, Share(), self._signals, lambda *_: None)

    def ready(self) -> None:
        """Answered once the model is loaded."""

    def make(self, shard: int, place: float | None) -> str | None:
        """Why a shard could not be made; None of one that is published. place: as ``Worker.make`` has it."""
        try:
            return self._worker.make(shard, place)
        except Interrupted:
            return INTERRUPTED

    def stop(self) -> None:
        """End the batch that is being made, and nothing more. It runs in a thread beside ``make``."""
        self._signals.asked = signal.SIGTERM


def on_ray(
    asked: Request, workers: int | None, gpus: int | str | None, progress: bool
) -> tuple[Folder, Job, dict[int, str]]:
    """Make all that is missing on the cluster that RAY_ADDRESS names, or this machine's; of each failed shard, why.

    Raises ImportError, ValueError, Interrupted, and RuntimeError where no actor can start.
    """
    try:
        import ray
    except ImportError:
        raise ImportError('engine "ray" needs ray: pip install "fastdiff-torch[ray]"') from None
    with Signals() as signals:
        with prepared(replace(asked, device="cpu"), signals, look_for_batch=False) as found:  # what is wrong, told once
            folder, job = found.folder, found.job
        del found  # the model: each actor has its own
        if len(folder.published(job)) == job.shards:
            return folder, job, {}
        with _cluster(ray), Bar(folder, job, progress) as bar:
            signals.at_once = False
            missing = [shard for shard in range(job.shards) if shard not in folder.published(job)]
            driver = Driver(ray, asked, workers, gpus, missing)
            try:
                driver.run(signals, lambda shard: bar.advanced(shard, len(job.numbers(shard))))
            finally:
                driver.end()
        if signals.asked is not None:
            raise with_progress(Interrupted("interrupted", signals.asked), folder, job)
    return folder, job, driver.failed


@contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """A connection, which is closed at the end unless it was there before; a cluster of its own ends with it."""
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level="WARNING")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process at once
    try:
        yield
    finally:
        ray.shutdown()


@dataclass
class Driver:
    """Gives each actor that is free a missing shard, until all are published or failed.

    There are as many actors as are asked for, or have a GPU or CPU, but never so many that they take the cluster's
    last CPU: the tasks that feed whatever else runs there would wait for it for ever. Where nodes come, actors are
    added; one that dies is restarted by Ray, by itself, and its shard is made again. Where no shard is left to begin,
    actors help with those that are being made, from their far end: one that hangs holds nothing up.

    Attributes:
        missing: shards that nobody makes yet; open: those that are neither published nor failed.
        busy: of each answer that is awaited, whose it is, and of which shard; None where an actor starts.
        failed: of each shard that could not be made, why.
    """

    ray: Any
    asked: Request
    workers: int | None
    gpus: int | str | None
    missing: list[int]
    actors: list[Any] = field(default_factory=list)
    busy: dict[Any, tuple[Any, int | None]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.open, self._deaths, self._why = set(self.missing), dict[Any, int](), "the cluster has no place"
        cards = int(self.ray.cluster_resources().get("GPU", 0))
        asked = self.asked.device not in ("auto", "cuda")
        self._on_gpus = self.gpus is not None or (cards > 0 and not asked)
        if self.gpus is not None and cards < 1:
            raise ValueError(f"gpus is {self.gpus}, and the cluster has none")

    def run(self, signals: Signals, made: Any) -> None:
        """made: told of each shard that is published."""
        while self.open and signals.asked is None:
            self._grow()
            if not self.busy:
                raise RuntimeError(f"no actor could start: {self._why}")
            done, _ = self.ray.wait(list(self.busy), timeout=PATIENCE)
            for answer in done:
                actor, shard = self.busy.pop(answer)
                try:
                    why = self.ray.get(answer)
                except self.ray.exceptions.RayActorError as error:
                    self._died(actor, shard, str(error).strip())
                    continue
                if shard in self.open and why is None:
                    self.open.discard(shard)
                    made(shard)
                elif shard in self.open:
                    self._give_up(shard, why)
                self._hand_out(actor)

    def end(self) -> None:
        """Let actors that make a shard end their batch where not all is done, and end them all."""
        if self.open:
            for actor in self.actors:
                actor.stop.remote()
            while made := [answer for answer, (_, shard) in self.busy.items() if shard is not None]:
                for answer in self.ray.wait(made, timeout=PATIENCE)[0]:
                    del self.busy[answer]
        for actor in self.actors:
            self.ray.kill(actor)

    def _grow(self) -> None:
        """As many actors as there is room for by now."""
        cluster = self.ray.cluster_resources()
        room = max(1, int(cluster.get("CPU", 1)) - 1)
        if self._on_gpus:
            room = min(room, int(cluster.get("GPU", 0)))
        wanted = self.workers if self.workers is not None else self.gpus
        wanted = room if wanted in (None, "all") else min(room, int(wanted))
        for _ in range(len(self.actors), wanted):
            made_of = self.ray.remote(Maker).options(
                num_cpus=1, num_gpus=int(self._on_gpus), max_restarts=-1, max_concurrency=2
            )
            self.actors.append(made_of.remote(self.asked))
            self._start(self.actors[-1])

    def _start(self, actor: Any) -> None:
        self.busy[actor.ready.remote()] = (actor, None)

    def _hand_out(self, actor: Any) -> None:
        while self.missing and self.missing[0] not in self.open:
            self.missing.pop(0)
        if self.missing:
            shard, helpers = self.missing.pop(0), -1
        elif self.open:
            at_it = [shard for _, shard in self.busy.values()]
            shard = min(self.open, key=lambda shard: (at_it.count(shard), shard))
            helpers = at_it.count(shard) - 1
        else:
            return
        place = None if helpers < 0 else helpers / (helpers + 1)
        self.busy[actor.make.remote(shard, place)] = (actor, shard)

    def _died(self, actor: Any, shard: int | None, why: str) -> None:
        """Await an actor's restart, unless it dies each time; begin its shard again, unless that is what it dies of."""
        self._why = why
        what = actor if shard is None else shard
        self._deaths[what] = self._deaths.get(what, 0) + 1
        if shard is not None and self._deaths[shard] >= TRIES:
            self._give_up(shard, f"an actor died of it {TRIES} times: {why}")
        elif shard in self.open:
            self.missing.insert(0, shard)
        if self._deaths.get(actor, 0) < TRIES:
            self._start(actor)

    def _give_up(self, shard: int, why: str) -> None:
        self.open.discard(shard)
        self.failed[shard] = why
