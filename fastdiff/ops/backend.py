"""Which implementation serves an operation: native (C++, CUDA), triton, or the reference in plain PyTorch."""

from __future__ import annotations

import os
from functools import lru_cache

from fastdiff.ops import native, triton_support

BACKENDS = ("native", "triton", "reference")
VARIABLE = "FASTDIFF_BACKEND"


def why_missing(backend: str, device_type: str, op: str = "randn") -> str | None:
    """Why a backend cannot serve an operation on a device type, or None where it can."""
    if device_type == "meta":
        return "meta tensors hold no numbers"
    if backend == "reference":
        return None
    if backend == "native":
        return native.missing(device_type, op)
    return triton_support.why_missing(device_type)


def choose(backend: str, device_type: str, op: str = "randn") -> str:
    """The backend that serves ``backend`` for an operation on a device type.

    "auto" takes what FASTDIFF_BACKEND names, or else native, then triton on a GPU, then the reference. Raises
    ValueError for an unknown name and RuntimeError for a named backend that cannot serve the device, saying why.
    """
    origin = "backend"
    if backend == "auto":
        backend, origin = os.environ.get(VARIABLE) or "auto", VARIABLE
    return _choose(backend, origin, device_type, op)


@lru_cache(maxsize=64)
def _choose(backend: str, origin: str, device_type: str, op: str) -> str:
    if backend == "auto":
        for candidate in BACKENDS:
            if candidate == "triton" and device_type == "cpu":
                continue
            if why_missing(candidate, device_type, op) is None:
                return candidate
        raise RuntimeError(f"no backend serves {device_type} tensors: {why_missing('reference', device_type)}")
    if backend not in BACKENDS:
        raise ValueError(f"{origin} is {backend!r}; it must be auto, {', '.join(BACKENDS)}")
    reason = why_missing(backend, device_type, op)
    if reason is not None and origin == VARIABLE and why_missing(backend, device_type) is None:
        return _choose("auto", origin, device_type, op)  # the variable speaks of all operations; this one lacks it
    if reason is not None:
        raise RuntimeError(f"{origin}={backend!r} cannot serve {device_type} tensors: {reason}")
    return backend
