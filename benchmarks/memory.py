"""The memory that a process holds at most while it makes a call, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def held() -> int | None:
    """Bytes in the process's memory now, after what was freed went back; None where the system does not say."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory otherwise
        return _field("VmRSS")
    except (OSError, AttributeError):
        return None


def peak(call: Callable[[], Any], since: int | None = None) -> int | None:
    """Bytes beyond ``since``, by default what is held before, that the process had at most during a call."""
    before = held()
    if before is None:
        return None
    try:
        _RESET.write_text("5")  # the highest count begins anew (proc(5))
    except OSError:
        return None
    call()
    return _field("VmHWM") - (before if since is None else since)


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
