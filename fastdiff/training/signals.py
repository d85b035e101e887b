"""Ctrl-C and SIGTERM while a run goes on: the step that is being done ends, is saved, and how to go on is said."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run that a signal ended; its text says what was kept. ``signal``: the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class Signals:
    """A context in which the first SIGINT or SIGTERM is noted, and a second one, or any while ``at_once``, interrupts.

    Only the main thread receives signals; elsewhere nothing changes. A signal that the process ignores stays ignored.

    Attributes:
        asked: the number of the signal that came, or None.
        at_once: nothing is being done that must end first.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, number: int, _: FrameType | None) -> None:
        again, self.asked = self.asked is not None, number
        if again or self.at_once:
            raise Interrupted("interrupted", number)
