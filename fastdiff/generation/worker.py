"""One process of a job: makes the shards that are missing, its own first."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from fastdiff.files import publish, remove
from fastdiff.generation.batch import entries, make
from fastdiff.generation.formats import Entry, check_png, read_tar, write_shard, write_tar
from fastdiff.generation.job import Folder, Job
from fastdiff.generation.labels import Labels
from fastdiff.generation.shares import Share
from fastdiff.generation.writer import Writer
from fastdiff.models.trained import TrainedModel
from fastdiff.training.signals import Interrupted, Signals


@dataclass
class Worker:
    """What a process needs to make images; ``run`` does.

    Attributes:
        advanced: told of each batch, once it is made: its shard, and how many images it has.
        parent: the process that this one ends with; None for one that was not launched.
        failed: of each shard that could not be made, why.
    """

    folder: Folder
    job: Job
    trained: TrainedModel
    labels: Labels
    share: Share
    signals: Signals
    advanced: Callable[[int, int], None]
    parent: int | None = None
    failed: dict[int, str] = field(default_factory=dict)

    def run(self) -> None:
        """Make all that is missing, or raise Interrupted when the batch that was being made is on the disk."""
        with Writer() as writer:
            for shard in self.share.order(self.job.shards):
                if (stop := self._make_shard(shard, writer)) is not None:
                    break
        if stop is not None:  # and the writer has done what waited
            raise stop

    def _make_shard(self, shard: int, writer: Writer) -> Interrupted | None:
        """Make what a shard lacks; why to stop, if so."""
        for batch in self._missing(shard):
            writer.check()
            if (stop := self._stop()) is not None:
                return stop
            if not self._make(shard, batch, writer):
                return None
        if not self.folder.shard(self.job, shard).exists():
            writer.put(partial(self._finish, shard))
        return self._stop()

    def _missing(self, shard: int) -> Iterator[range]:
        """The batches of a shard that nobody has made by the time that they are asked for.

        In a shard of another's share the first who helps begins at the far end, and others elsewhere, so that they meet
        neither each other nor the one who is at it.
        """
        batches, place = self.job.batches(shard), self.share.place(shard, self.job.shards)
        if place is not None:
            turn = int(place * len(batches))
            batches = [*batches[::-1][turn:], *batches[::-1][:turn]]
        published = self.folder.shard(self.job, shard)
        for batch in batches:
            if not (self.folder.batch(shard, batch).exists() or published.exists()):
                yield batch

    def _make(self, shard: int, batch: range, writer: Writer) -> bool:
        """Make a batch and have it written; False where the network failed, which is noted."""
        try:
            made = make(self.job, self.trained, batch, self.labels.of(batch))
        except Exception as error:  # whatever a network raises costs its shard alone
            self.failed[shard] = f"images {batch.start} to {batch.stop - 1}: {type(error).__name__}: {error}"
            return False

        def write() -> None:
            place = self.folder.batch(shard, batch)
            with self._unless_published(shard):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_tar(place, entries(self.job, self.labels.classes, made))

        writer.put(write)
        self.advanced(shard, len(batch))
        return True

    def _finish(self, shard: int) -> None:
        """Make the shard of its batches and publish it, unless another process has."""
        published, batches = self.folder.shard(self.job, shard), self.job.batches(shard)
        place = self.folder.batch(shard, batches[0]).parent
        if not published.exists():
            temporary = self.folder.temporary(place, published.name)
            try:
                with self._unless_published(shard):
                    write_shard(self.job.format, temporary, self._entries(shard, batches))
                    publish(temporary, published)
            except _Damaged as error:
                self.failed[shard] = str(error)
                return
            finally:
                remove(temporary)
        remove(place)

    def _entries(self, shard: int, batches: list[range]) -> Iterator[Entry]:
        for batch in batches:
            place = self.folder.batch(shard, batch)
            try:
                found = list(read_tar(place))
                for entry, number in zip(found, batch, strict=True):
                    check_png(entry)
                    if entry.record["number"] != number:
                        raise ValueError(f"it has image {entry.record['number']} in the place of {number}")
            except FileNotFoundError:
                raise
            except Exception as error:
                place.unlink(missing_ok=True)
                raise _Damaged(
                    f"{place} was damaged, and is removed: the same command makes it again: {error}"
                ) from None
            yield from found

    @contextmanager
    def _unless_published(self, shard: int) -> Iterator[None]:
        """Who publishes a shard removes its batches: what another process then misses of them, it needs no more."""
        try:
            yield
        except FileNotFoundError:
            if not self.folder.shard(self.job, shard).exists():
                raise

    def _stop(self) -> Interrupted | None:
        if self.signals.asked is not None:
            return Interrupted("interrupted", self.signals.asked)
        if self.parent is not None and os.getppid() != self.parent:
            return Interrupted("the process that started this one has ended", signal.SIGTERM)
        return None


class _Damaged(Exception):
    """A batch that is not what was written."""
