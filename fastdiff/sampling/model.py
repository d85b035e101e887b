"""Your network as the loop sees it: where it is, what it takes, what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastdiff.checks import DTYPES, check_device


@dataclass(frozen=True)
class Network:
    """A network and what it takes: where it is, its dtype, and the memory format of its input."""

    model: Callable[..., Any]
    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format


def describe(
    model: Callable[..., Any],
    shape: tuple[int, ...],
    device: torch.device | str | None,
    model_dtype: torch.dtype | None,
) -> Network:
    """Where a network is, what dtype it takes, and in which memory format, as its parameters have it."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    floating = [p for p in parameters if p.is_floating_point()]
    if device is not None:
        where = check_device(device)
    else:
        where = parameters[0].device if parameters else torch.get_default_device()
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if parameters and parameters[0].device != where:
        raise ValueError(f"device is {where}, but the model's parameters are on {parameters[0].device}")
    dtype = (floating[0].dtype if floating else torch.float32) if model_dtype is None else model_dtype
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"model_dtype must be float32, bfloat16 or float16; got {dtype}")
    strided = (p for p in floating if p.ndim == 4 and not p.is_contiguous())
    nhwc = len(shape) == 4 and any(p.is_contiguous(memory_format=torch.channels_last) for p in strided)
    return Network(model, where, dtype, torch.channels_last if nhwc else torch.contiguous_format)


def first_tensor(out: Any) -> Tensor:
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        return out[0]
    sample = getattr(out, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    raise TypeError(
        "model must return a tensor, a tuple that starts with one, or an object whose .sample is one; "
        f"got {type(out).__name__}"
    )


# How many runs hold each module in eval mode: the last one to end gives its flag back.
_held: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_lock = Lock()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A module that is in training mode, in eval mode for a while; each submodule's own flag comes back.

    Runs in several threads may hold one module at once.
    """
    held = []
    with _lock:
        for module in model.modules() if isinstance(model, nn.Module) else ():
            if module.training or module in _held:
                module.training = False
                _held[module] = _held.get(module, 0) + 1
                held.append(module)
    try:
        yield
    finally:
        with _lock:
            for module in held:
                _held[module] -= 1
                if _held[module] == 0:
                    del _held[module]
                    module.training = True
