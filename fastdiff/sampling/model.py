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

from fastdiff.checks import DTYPES, check_device, kind_of


@dataclass(frozen=True)
class ModelInfo:
    """A network and what it takes: where it is, its dtype, and the memory format of its input."""

    model: Callable[..., Any]
    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format


def inspect(
    model: Callable[..., Any],
    shape: tuple[int, ...],
    device: torch.device | str | None,
    model_dtype: torch.dtype | None,
) -> ModelInfo:
    """Where a network is, what dtype it takes, and in which memory format, as its parameters have it."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    floating = list(filter(Tensor.is_floating_point, parameters))
    if device is not None:
        where = check_device(device)
    else:
        where = parameters[0].device if parameters else torch.get_default_device()
    if where.type == "meta":
        raise ValueError("device is meta, whose tensors hold no numbers; move the model, or give device=")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if parameters and parameters[0].device != where:
        raise ValueError(f"device is {where}, but the model's parameters are on {parameters[0].device}")
    dtype = (floating[0].dtype if floating else torch.float32) if model_dtype is None else model_dtype
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"model_dtype must be float32, bfloat16 or float16; got {dtype!r}")
    layout = torch.contiguous_format
    for p in floating if len(shape) == 4 else ():
        if p.ndim == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
            break
    return ModelInfo(model, where, dtype, layout)


def check_model(model: Any) -> None:
    """TypeError for what is no network: a class of one, a pipeline, or a folder's content."""
    if isinstance(model, type):
        raise TypeError(f"model must be a network; got the class {model.__name__}: make one, {model.__name__}(…)")
    if callable(model) and not type(model).__name__.endswith("Pipeline"):
        return
    inner = [name for name in ("unet", "transformer") if isinstance(getattr(model, name, None), nn.Module)]
    raise TypeError(
        f"model must be a network, called as model(x, t); got {type(model).__name__}"
        + (f": give its network, .{inner[0]}" if inner else "")
    )


def first_tensor(out: Any) -> Tensor:
    """The tensor of what a network returned."""
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        return out[0]
    sample = getattr(out, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    raise TypeError(
        "model must return a tensor, a tuple that starts with one, or an object whose .sample is one; "
        f"got {kind_of(out)}"
    )


def mismatch(error: Exception, x: Tensor, times: Tensor) -> str | None:
    """What to say of an error inside a network which comes of the dtypes that it was given; None of any other."""
    told, given = str(error).lower(), f"the network was given x in {x.dtype} and t in {times.dtype}"
    if times.is_floating_point() and any(word in told for word in ("indices", "index tensor", "for index")):
        return (
            f"{given}, since the plan has timesteps between two whole ones; "
            'sampler_options={"quantize": True} rounds them'
        )
    if any(word in told for word in ("same dtype", "scalar type", "should be the same")):
        if "long" in told:
            return f"{given}; a network that computes with t itself converts it, t.to(x.dtype)"
        return f"{given}; model_dtype= says what a network takes that has no parameters to tell it by"
    return None


# Which runs hold each module in eval mode: the last one to end gives its flag back.
_held: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()
_lock = Lock()
ATTEMPTS = 100


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """A module that is in training mode, in eval mode for a while; each submodule's own flag comes back.

    Runs in several threads may hold one module at once. An interrupt (Ctrl-C, or what another signal's handler
    raises), wherever it comes, leaves no module in eval mode: it is raised once every flag is back.
    """
    run, held = object(), False
    try:
        with _lock:
            for module in model.modules() if isinstance(model, nn.Module) else ():
                if module.training or module in _held:
                    held = True
                    _held[module] = {*_held.get(module, ()), run}  # noted before it is done, so that it will be undone
                    module.training = False
        yield
    finally:
        if held:
            try:
                _release_all(run)
            except BaseException:  # an interrupt between its attempts
                _release_all(run)
                raise


def _release_all(run: object) -> None:
    """End a run's hold, whatever interrupts it: a further attempt finds what the last one left."""
    interrupt = None
    for _ in range(ATTEMPTS):
        try:
            _release(run)
        except BaseException as error:
            interrupt = error
        else:
            break
    if interrupt is not None:
        raise interrupt


def _release(run: object) -> None:
    """End a run's hold of every module that it has; may be called again."""
    with _lock:
        for module, runs in list(_held.items()):
            if run not in runs:
                continue
            if len(runs) == 1:  # the flag first: should an interrupt come in between, the next attempt sets it again
                module.training = True
                del _held[module]
            else:
                runs.discard(run)
