"""Which network turns pictures into features, and by what it is known again."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from fastdiff.checks import all_finite
from fastdiff.evaluation.features import ImageNetFeatures
from fastdiff.models.trained import TrainedModel, digits, load
from fastdiff.pictures.network import weights_sha256
from fastdiff.samplers import euler

IMAGENET, DIGITS = "efficientnet", "digits"
LEVELS = 10  # of a diffusion network's schedule: its features are those of the last, of the least noise
_SUFFIXES = (".pt", ".pth", ".ts", ".pt2")


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What features are of: the network's name, and the SHA-256 of its weights, or of the file that it came in."""

    name: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} ({self.sha256[:12]})"


@dataclass(frozen=True, eq=False)
class Features:
    """Float32 [B, D] on the CPU of images [B, channels, H, W] in [-1, 1] on the CPU, by a network on ``device``."""

    function: Callable[[Tensor], Any]
    identity: Identity
    device: torch.device
    channels: int = 3

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        try:
            found = self.function(images.to(self.device))
        except Exception as error:  # whatever a foreign network raises
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.identity.name} does not take images {list(images.shape)}: {told}") from error
        if not isinstance(found, Tensor) or not found.is_floating_point():
            got = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"{self.identity.name} must return a floating-point tensor; got {got}")
        if found.ndim == 4 and found.shape[2:] == (1, 1):
            found = found.flatten(1)
        if found.ndim != 2 or len(found) != len(images) or found.shape[1] == 0:
            raise ValueError(f"{self.identity.name} must return [{len(images)}, D]; got {list(found.shape)}")
        found = found.float().cpu()
        if not all_finite(found):
            raise ValueError(f"{self.identity.name} returned NaN or infinity")
        return found


def features_of(name: str, device: torch.device) -> Features:
    """Features by name.

    name: "efficientnet", the wheel's; "digits", the network in the package; ``module:attribute``, a module of torch, or
        what makes one when it is called; a file of TorchScript (.pt, .pth, .ts) or of torch.export (.pt2); or a model's
        folder, of whose network the features between its two halves are taken.
    Foreign networks are given float32 images [B, 3, H, W] in [-1, 1], and return [B, D] for any B.
    Raises ValueError or TypeError for what is none of these, ImportError where a module or the extra is missing.
    """
    if name == IMAGENET:
        network = ImageNetFeatures(device=device)
        told = Identity(name=f"EfficientNet-Lite0 at {network.size}", sha256=weights_sha256(network.network))
        return Features(network, told, device)
    if name == DIGITS:
        return _of_diffusion(digits(), "the packaged digits", device)
    path = Path(name)
    if path.is_dir():
        return _of_diffusion(load(path), path.resolve().name, device)
    if path.suffix in _SUFFIXES:
        return _of_file(path, device)
    if re.fullmatch(r"[\w.]+:[\w.]+", name):
        module = _imported(name).to(device).eval()
        return Features(module, Identity(name=name, sha256=weights_sha256(module)), device)
    raise ValueError(
        f"features are {name!r}; they must be {IMAGENET}, {DIGITS}, module:attribute, a file "
        f"({', '.join(_SUFFIXES)}) or a model's folder"
    )


def _imported(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as with `python -m`
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise ImportError(f"features are {name!r}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"features are {name!r}: {error}") from error
    made = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(made, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, or make one when it is called; got {type(made).__name__}")
    return made


def _of_file(path: Path, device: torch.device) -> Features:
    if not path.exists():
        raise FileNotFoundError(f"no file {path} of a network")
    kind = "torch.export" if path.suffix == ".pt2" else "TorchScript"
    try:
        if path.suffix == ".pt2":
            module = torch.export.load(path).module().to(device)
        else:
            module = torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # of many kinds, by version
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is no file of {kind}: {first}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Features(module, Identity(name=f"{path.name} ({kind})", sha256=digest), device)


def _of_diffusion(trained: TrainedModel, name: str, device: torch.device) -> Features:
    """What a diffusion network knows of a picture with next to no noise, between its two halves, averaged over the
    picture (after Baranchuk et al. 2022, who add the noise of a timestep; here there is none, so that features have no
    chance in them).
    """
    channels = trained.image_shape[0]
    if channels not in (1, 3):
        raise ValueError(f"the network in {name} is one of {channels} channels, and pictures have 1 or 3")
    unet = trained.unet.to(device)
    if unet.mid_block is None:
        raise ValueError(f"the network in {name} has no middle block to take features of")
    prediction = trained.sampling.get("prediction", "epsilon")
    row = euler(trained.sampling["schedule"], LEVELS, prediction=prediction).rows[-1]
    found: list[Tensor] = []
    unet.mid_block.register_forward_hook(lambda module, args, output: found.append(output))

    def function(images: Tensor) -> Tensor:
        unet(images * (row.alpha * row.c_in), row.t)
        return found.pop().mean((2, 3))

    told = Identity(name=f"the middle of {name}", sha256=weights_sha256(unet))
    return Features(function, told, device, channels)
