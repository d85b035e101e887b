"""One process of a job: makes the shards that are missing, its own first."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fastdiff.generation.batch import entries, make
from fastdiff.generation.formats import Entry, check_png, read_tar, write_shard, write_tar
from fastdiff.generation.job import Folder, Job
from fastdiff.generation.labels import Labels
from fastdiff.generation.models import Model
from fastdiff.generation.prompts import Prompts
from fastdiff.generation.shares import Share
from fastdiff.generation.writer import Writer
from fastdiff.training.signals import Interrupted, Signals


@dataclass
class Worker:
    """What a process needs to make images; ``run`` does.

    Attributes:
        given: the label or prompt of each image.
        advanced: told of each batch, once it is made: its shard, and how many images it has.
        parent: the process that this one ends with; None for one that was not launched.
        failed: of each shard that could not be made, why.
    """

    folder: Folder
    job: Job
    model: Model
    given: Labels | Prompts
    share: Share
    signals: Signals
    advanced: Callable[[int, int], None]
    parent: int | None = None
    failed: dict[int, str] = field(default_factory=dict)

    def run(self) -> None:
        """Make all that is missing, or raise Interrupted when the batch that was being made is on the disk."""
        shards, stop = self.job.shards, None
        own = len(self.share.own(shards))
        with Writer() as writer:
            published = self.folder.published(self.job)
            for i, shard in enumerate(self.share.order(shards)):
                if i == own:  # one listing spares a look at each of the others' shards
                    published = self.folder.published(self.job)
                if shard not in published:
                    stop = self._make_shard(shard, self.share.place(shard, shards), writer)
                if stop is not None:
                    break
        if stop is not None:  # and the writer has done what waited
            raise stop

    def make(self, shard: int, place: float | None = None) -> str | None:
        """Make one shard and publish it; why that failed, if so. place: of who helps with it, as ``Share.place``."""
        with Writer() as writer:
            stop = self._make_shard(shard, place, writer)
        if stop is not None:
            raise stop
        return self.failed.pop(shard, None)

    def _make_shard(self, shard: int, place: float | None, writer: Writer) -> Interrupted | None:
        """Make what a shard lacks; why to stop, if so."""
        for batch in self._missing(shard, place):
            writer.check()
            if (stop := self._stop()) is not None:
                return stop
            if not self._make(shard, batch, writer):
                return None
        if not self._is_published(shard):
            writer.put(partial(self._finish, shard))
        return self._stop()

    def _missing(self, shard: int, place: float | None) -> Iterator[range]:
        """The batches of a shard that nobody has made by the time that they are asked for.

        In a shard of another's share the first who helps begins at the far end, and others elsewhere, so that they meet
        neither each other nor the one who is at it.
        """
        batches = self.job.batches(shard)
        if place is not None:
            turn = int(place * len(batches))
            batches = [*batches[::-1][turn:], *batches[::-1][:turn]]
        for batch in batches:
            if self._is_published(shard):
                return
            if not self._is_kept(shard, batch):
                yield batch

    def _is_kept(self, shard: int, batch: range) -> bool:
        """Whether a batch is there; of a batch-invariant job, also in batches of other sizes."""
        if not self.job.batch_invariant:
            return self.folder.store.has(self.folder.batch(shard, batch))
        return not set(batch) - {number for kept in self.folder.kept(shard) for number in kept}

    def _make(self, shard: int, batch: range, writer: Writer) -> bool:
        """Make a batch and have it written; False where the network failed, which is noted."""
        try:
            made = make(self.job, self.model, batch, self.given.of(batch))
        except Exception as error:  # whatever a network raises costs its shard alone
            self.failed[shard] = f"images {batch.start} to {batch.stop - 1}: {type(error).__name__}: {error}"
            return False

        def write() -> None:
            if self._is_published(shard):  # meanwhile, and a whole set keeps no batches
                return
            with self._unless_published(shard):
                found = entries(self.job, self.model, made)
                self.folder.store.replace(self.folder.batch(shard, batch), lambda path: write_tar(path, found))

        writer.put(write)
        self.advanced(shard, len(batch))
        return True

    def _finish(self, shard: int) -> None:
        """Make the shard of its batches and publish it, unless another process has."""
        name, beside = self.job.shard_name(shard), self.folder.beside(shard)

        def write(path: Path) -> None:
            write_shard(self.job.format, path, self._entries(shard))

        if not self._is_published(shard):
            try:
                with self._unless_published(shard):
                    self.folder.store.create(name, write, scratch=beside)
            except _Damaged as error:
                self.failed[shard] = str(error)
                return
        self.folder.store.remove(beside)

    def _entries(self, shard: int) -> Iterator[Entry]:
        """Each image of a shard once, of the batches that are there."""
        numbers, kept = self.job.numbers(shard), self.folder.kept(shard)
        at = numbers.start
        while at < numbers.stop:
            batch = next((batch for batch in kept if batch.start <= at < batch.stop), None)
            if batch is None:
                raise FileNotFoundError(f"{self.folder.path}: image {at} of {self.job.shard_name(shard)} is missing")
            name = self.folder.batch(shard, batch)
            try:
                with self.folder.store.local(name) as path:
                    found = list(read_tar(path))
                for entry, number in zip(found, batch, strict=True):
                    check_png(entry)
                    if entry.record["number"] != number:
                        raise ValueError(f"it has image {entry.record['number']} in the place of {number}")
            except FileNotFoundError:
                raise
            except Exception as error:
                self.folder.store.remove(name)
                raise _Damaged(
                    f"{self.folder.path}/{name} was damaged, and is removed: the same command makes it again: {error}"
                ) from None
            yield from found[at - batch.start :]
            at = batch.stop

    def _is_published(self, shard: int) -> bool:
        return self.folder.store.has(self.job.shard_name(shard))

    @contextmanager
    def _unless_published(self, shard: int) -> Iterator[None]:
        """Who publishes a shard removes its batches: what another process then misses of them, it needs no more."""
        try:
            yield
        except FileNotFoundError:
            if not self._is_published(shard):
                raise

    def _stop(self) -> Interrupted | None:
        if self.signals.asked is not None:
            return Interrupted("interrupted", self.signals.asked)
        if self.parent is not None and os.getppid() != self.parent:
            return Interrupted("the process that started this one has ended", signal.SIGTERM)
        return None


class _Damaged(Exception):
    """A batch that is not what was written."""
