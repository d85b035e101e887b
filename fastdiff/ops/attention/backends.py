"""Which backend serves attention: the reference, torch's scaled_dot_product_attention, or Triton. None is native."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastdiff.ops import triton_support
from fastdiff.ops.backend import BACKENDS as OTHERS
from fastdiff.ops.backend import VARIABLE

BACKENDS = ("reference", "torch", "triton")
NAMES = f"auto, {', '.join(BACKENDS)}"


def check(backend: str) -> None:
    """Raises ValueError for a name that is none of attention's."""
    if backend == "native":
        raise ValueError(f"backend is 'native', but attention has no native kernel; it must be {NAMES}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be {NAMES}")


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_size: int, keys: int) -> str:
    """The backend that serves ``backend``; RuntimeError for one that cannot serve the device, saying why."""
    why = "named by the caller"
    if backend == "auto":
        backend, why = choice(device.type, dtype, head_size, keys)
    reason = why_missing(backend, device.type)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} ({why}) cannot serve {device.type} tensors: {reason}")
    return backend


def why_missing(backend: str, device_type: str) -> str | None:
    """Why a backend cannot serve a device type, or None where it can."""
    if device_type == "meta":
        return "meta tensors hold no numbers"
    return triton_support.why_missing(device_type) if backend == "triton" else None


def choice(device_type: str, dtype: torch.dtype, head_size: int, keys: int = 1024) -> tuple[str, str]:
    """What "auto" means for heads of ``head_size`` channels on the current device of a type, and why.

    FASTDIFF_BACKEND decides where it names one of attention's backends. One that only other operations have, such as
    native, leaves the choice to choice.json; an unknown name is a ValueError.
    """
    named = os.environ.get(VARIABLE) or "auto"
    if named in BACKENDS:
        return named, f"{VARIABLE} names it"
    if named != "auto" and named not in OTHERS:
        raise ValueError(f"{VARIABLE} is {named!r}; it must be {NAMES}, {', '.join(set(OTHERS) - set(BACKENDS))}")
    if device_type != "cuda":
        return "torch", f"there is no other kernel for {device_type} devices"
    backend, why = tabulated(_chip(), dtype.itemsize, head_size, keys)
    reason = why_missing(backend, device_type)
    return (backend, why) if reason is None else ("torch", reason)


@lru_cache(maxsize=256)
def tabulated(chip: str, element_size: int, head_size: int, keys: int) -> tuple[str, str]:
    """choice.json's backend for a chip, "sm_90" or "gfx942", and where the entry comes from."""
    table = _table()
    entry = table.get(chip) or table["default"]
    rows = entry[f"{8 * element_size}-bit"]
    size, most, backend = next(r for r in rows if head_size <= r[0] and (keys <= r[1] or not r[1]))
    return backend, f"heads of up to {size} channels{f', up to {most} keys' if most else ''}; {entry['source']}"


def _chip() -> str:
    """The current GPU's architecture, named as in tiles.json; "default" without one."""
    if not torch.cuda.is_available():
        return "default"
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("choice.json").read_text(encoding="utf-8"))
