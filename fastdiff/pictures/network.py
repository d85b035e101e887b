"""Which network made an image, and on what: what a recipe names, so that another one is not taken for it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from fastdiff.acceleration.network import network_of, networks_in
from fastdiff.ops.backend import chip_of
from fastdiff.pictures.values import as_bytes
from fastdiff.version import __version__


class Acceleration(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How ``fastdiff.accelerate`` was called: the dtype that it computes in, and the other arguments."""

    dtype: str
    exact_convolutions: bool
    batch_invariant: bool = False


class Identity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A network, by what its results depend on.

    Attributes:
        name: of its class, or of the function.
        folder: where it was loaded from, as it was named then; None where that is not known.
        sha256: of its configuration and its weights (``weights_sha256``); None for a function.
        dtype: of its weights; None for a function.
        channels_last: whether its convolutions' weights lie in that memory format.
        compiled: whether it went through torch.compile.
        accelerated: how it was accelerated; None where it was not. A part of it alone that was is ``partly``.
    """

    name: str
    folder: str | None = None
    sha256: str | None = None
    dtype: str | None = None
    channels_last: bool = False
    compiled: bool = False
    accelerated: Acceleration | None = None
    partly: bool = False


def identify(model: Any) -> Identity:
    """A network's identity, now."""
    module = getattr(model, "_orig_mod", model)
    if not isinstance(module, nn.Module):
        if callable(identity := getattr(model, "identity", None)):  # a pipeline, whose parts are several
            told: Identity = identity()
            return told
        return Identity(name=getattr(model, "__qualname__", type(model).__qualname__))
    floating = [p for p in module.parameters() if p.is_floating_point()]
    found = network_of(module)
    accelerated = None if found is None else Acceleration(_dtype(found.dtype), found.exact, found.invariant)
    return Identity(
        name=f"{type(module).__module__}.{type(module).__qualname__}",
        folder=_folder(module),
        sha256=weights_sha256(module),
        dtype=_dtype(floating[0].dtype) if floating else None,
        channels_last=any(
            p.ndim == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
            for p in floating
        ),
        compiled=module is not model,
        accelerated=accelerated,
        partly=found is None and bool(networks_in(module)),
    )


def weights_sha256(module: nn.Module) -> str:
    """The SHA-256 of a network's configuration, where it has one, and of its state dict: names, dtypes, shapes, bytes.

    It does not depend on the device, the memory format, or ``fastdiff.accelerate``. Two gigabytes take a second or two.
    """
    digest = hashlib.sha256(json.dumps(_config(module), sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(as_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, str]:
    """What else a network's rounding may depend on, by name."""
    on_gpu = device.type == "cuda"
    return {
        "fastdiff": __version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "chip": chip_of(device) if on_gpu else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "matmul precision": torch.get_float32_matmul_precision(),
    }


def _config(module: nn.Module) -> Any:
    """Options that the weights do not show, such as a norm's epsilon; keys with an underscore say where it lies.

    What transformers writes of its own version is left out: it is no option.
    """
    config = getattr(module, "config", None)
    to_dict = getattr(config, "to_dict", None)
    config = to_dict() if callable(to_dict) else config
    if not isinstance(config, Mapping):
        return None
    return {str(k): v for k, v in config.items() if str(k)[:1] != "_" and k != "transformers_version"}


def _folder(module: nn.Module) -> str | None:
    """Where a network of ours, of diffusers or of transformers says that it was loaded from."""
    config = getattr(module, "config", None)
    told = [getattr(module, "name_or_path", None), getattr(config, "_name_or_path", None)]
    return next((name for name in told if isinstance(name, str) and name), None)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
