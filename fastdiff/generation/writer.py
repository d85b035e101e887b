"""A thread that encodes and writes while the network computes, with a short queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

WAITING = 2  # batches


class Writer:
    """A context whose thread runs tasks one after another; the first error is raised where the next task is given.

    At its end all tasks are done; where the block raised, those that have not begun are left out.
    """

    def __init__(self) -> None:
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="fastdiff-writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopped = kind is not None
        self._tasks.put(None)
        self._thread.join()
        if kind is None:
            self.check()

    def put(self, task: Callable[[], None]) -> None:
        """Wait for a place in the queue."""
        self.check()
        self._tasks.put(task)

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._stopped or self._error is not None:
                continue
            try:
                task()
            except BaseException as error:
                self._error = error
