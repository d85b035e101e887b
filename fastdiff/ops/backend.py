"""Which implementation serves a call: native (C++, CUDA), triton, torch (a library's own kernel) or the reference.

Operations without a table (``choose``) take the first of BACKENDS that they have and that serves the device. Where a
measurement decides (``select``), choice.json beside the operation has rules by chip: a kernel and the bounds of a
call's facts within which it was the fastest. The first rule whose bounds hold, and whose kernel computes the call, is
taken. ``fastdiff info`` prints these tables.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdiff.ops import native, triton_support

BACKENDS = ("native", "triton", "torch", "reference")
FUSED = ("native", "triton", "reference")  # of an operation that no library has
VARIABLE = "FASTDIFF_BACKEND"
TABLES = ("attention", "conv2d", "group_norm_silu")


def why_missing(backend: str, device_type: str, op: str = "randn") -> str | None:
    """Why a backend cannot serve an operation on a device type, or None where it can."""
    if device_type == "meta":
        return "meta tensors hold no numbers"
    if backend == "native":
        return native.missing(device_type, op)
    return triton_support.why_missing(device_type) if backend == "triton" else None


def check_backend(op: str, backend: str, known: tuple[str, ...] = FUSED) -> None:
    """Raises ValueError for a name that is no backend of an operation."""
    if isinstance(backend, str) and (backend == "auto" or backend in known):
        return
    if not isinstance(backend, str):
        raise ValueError(f"backend is {backend!r}; it must be auto, {', '.join(known)}")
    why = f", but {op} has no {backend} kernel" if backend in BACKENDS else ""
    raise ValueError(f"backend is {backend!r}{why}; it must be auto, {', '.join(known)}")


def from_environment(known: tuple[str, ...]) -> str | None:
    """What FASTDIFF_BACKEND names, if the operation has it; ValueError for a name that no operation has."""
    name = os.environ.get(VARIABLE) or "auto"
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{VARIABLE} is {name!r}; it must be auto, {', '.join(BACKENDS)}")
    return name if name in known else None


def choose(backend: str, device_type: str, op: str = "randn") -> str:
    """The backend that serves ``backend`` for an operation without a table on a device type.

    "auto" takes what FASTDIFF_BACKEND names, or else native, then triton on a GPU, then the reference. Raises
    ValueError for an unknown name and RuntimeError for a named backend that cannot serve the device, saying why.
    """
    if isinstance(backend, str) and backend == "auto":
        return _choose(from_environment(FUSED) or "auto", VARIABLE, device_type, op)
    check_backend(op, backend)
    return _choose(backend, "backend", device_type, op)


@lru_cache(maxsize=64)
def _choose(backend: str, origin: str, device_type: str, op: str) -> str:
    if backend == "auto":
        for candidate in FUSED:
            if candidate == "triton" and device_type == "cpu":
                continue
            if why_missing(candidate, device_type, op) is None:
                if candidate == "reference" and device_type == "cpu":
                    warnings.warn(  # Python shows it once, since neither its text nor its place changes
                        "fastdiff computes by PyTorch alone here, several times slower, without its C++ kernels: "
                        f"`fastdiff info` says why; {VARIABLE}=reference says that this is meant",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                return candidate
        raise RuntimeError(f"no backend serves {device_type} tensors: {why_missing('reference', device_type)}")
    reason = why_missing(backend, device_type, op)
    if reason is not None and origin == VARIABLE and why_missing(backend, device_type) is None:
        return _choose("auto", origin, device_type, op)  # the variable speaks of all operations; this one lacks it
    if reason is not None:
        raise RuntimeError(f"{origin}={backend!r} cannot serve {device_type} tensors: {reason}")
    return backend


class Rule(NamedTuple):
    """A kernel, and for each fact that counts the least and the most for which it is taken."""

    kernel: str
    bounds: Mapping[str, tuple[float, float]]

    def holds(self, facts: Mapping[str, float]) -> bool:
        return all(low <= facts[name] <= high for name, (low, high) in self.bounds.items())

    def __str__(self) -> str:
        def bound(name: str, low: float, high: float) -> str:
            if low == high:
                return f"{name} = {low:g}"
            return f"{name} ≥ {low:g}" if math.isinf(high) else f"{name} ≤ {high:g}" if not low else (
                f"{low:g} ≤ {name} ≤ {high:g}"
            )  # fmt: skip

        conditions = ", ".join(bound(name, *pair) for name, pair in self.bounds.items())
        return f"{self.kernel} where {conditions}" if conditions else self.kernel


class Entry(NamedTuple):
    """A chip's rules, in the order in which they are asked, and where they come from."""

    rules: tuple[Rule, ...]
    source: str


@lru_cache(maxsize=len(TABLES))
def table(op: str) -> dict[str, Entry]:
    """choice.json of an operation: entries by chip, and "gpu" and "cpu" for those without one."""
    text = (Path(__file__).parent / op / "choice.json").read_text(encoding="utf-8")
    return {chip: _entry(entry) for chip, entry in json.loads(text).items() if chip != "about"}


def _entry(entry: dict[str, Any]) -> Entry:
    def pair(bounds: list[float | None]) -> tuple[float, float]:
        low, high = bounds
        return (0 if low is None else low), (math.inf if high is None else high)

    rules = (Rule(kernel, {name: pair(b) for name, b in bounds.items()}) for kernel, bounds in entry["rules"])
    return Entry(tuple(rules), entry["source"])


def chip_of(device: torch.device) -> str:
    """A device as tables name it: "sm_90", "gfx942"; of a CPU the kernels in use: "avx512", "avx2", "portable"."""
    if device.type != "cuda":
        module = native.extension()
        return "cpu" if isinstance(module, str) or device.type != "cpu" else module.cpu_simd()
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _gpu(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def entry_for(op: str, device: torch.device) -> Entry:
    """The rules for a device."""
    entries = table(op)
    return entries.get(chip_of(device)) or entries["gpu" if device.type == "cuda" else "cpu"]


def select(
    op: str,
    backend: str,
    device: torch.device,
    facts: Mapping[str, float],
    kernels: Mapping[str, str],
    refusal: Callable[[str], str | None] = lambda kernel: None,
) -> str:
    """The kernel that serves a call, by the operation's table.

    Args:
        backend: "auto", what FASTDIFF_BACKEND names or else the table's choice; or a backend, whose kernel serves
            whatever the table prefers.
        facts: the numbers that the table's bounds speak of.
        kernels: the operation's kernels and the backend of each.
        refusal: why a kernel does not compute this call, or None.

    Raises:
        ValueError: for a name that is no backend of the operation.
        RuntimeError: where none serves, saying why.
    """
    known = tuple(dict.fromkeys(kernels.values()))
    check_backend(op, backend, known)
    origin, named = "backend", backend
    if backend == "auto":
        origin, named = VARIABLE, from_environment(known) or "auto"
    suited = [rule.kernel for rule in entry_for(op, device).rules if rule.holds(facts)]
    if named != "auto":
        suited_of_it = [kernel for kernel in (*suited, *kernels) if kernels[kernel] == named]
        kernel, reason = _first(op, suited_of_it, device, kernels, refusal)
        if kernel is not None:
            return kernel
        if origin == "backend" or why_missing(named, device.type) is not None:  # the variable speaks of all operations
            raise RuntimeError(f"{origin}={named!r} cannot serve this {op} on {device.type}: {reason}")
    kernel, reason = _first(op, suited, device, kernels, refusal)
    if kernel is None:
        raise RuntimeError(f"no backend serves this {op} on {device.type}: {reason}")
    return kernel


def _first(
    op: str, candidates: list[str], device: torch.device, kernels: Mapping[str, str],
    refusal: Callable[[str], str | None],
) -> tuple[str | None, str | None]:  # fmt: skip
    """The first kernel that serves, or None and why the last one does not."""
    reason: str | None = "none of its kernels is for such a call"
    for kernel in candidates:
        reason = why_missing(kernels[kernel], device.type, op) or refusal(kernel)
        if reason is None:
            return kernel, None
    return None, reason
