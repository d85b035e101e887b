"""Checkpoint folders in diffusers' layout: `config.json` beside `diffusion_pytorch_model.safetensors` or `.bin`."""

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastdiff.files import atomic_write, read_json_object

CONFIG = "config.json"
SAFETENSORS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"
CLASS_NAME = "UNet2DModel"

# The names that attention weights had in early checkpoints; diffusers renames them as it loads, too.
_OLD_ATTENTION = re.compile(r"(\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")
_NEW_NAME = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def find(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Finds the configuration and the weights in a model's folder, or in the `unet` subfolder of a pipeline's.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks the configuration or the weights.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    if not (root / CONFIG).is_file() and (root / "unet" / CONFIG).is_file():
        root = root / "unet"
    if not (root / CONFIG).is_file():
        raise FileNotFoundError(f"{root} holds no {CONFIG}")
    for name in (SAFETENSORS, PICKLE):
        if (root / name).is_file():
            return root / CONFIG, root / name
    raise FileNotFoundError(f"{root} holds neither {SAFETENSORS} nor {PICKLE}")


def read_config(path: Path) -> dict[str, Any]:
    """Reads the fields of a `UNet2DModel`'s configuration.

    Raises:
        ValueError: the file is not JSON, or it configures something else.
    """
    config = read_json_object(path)
    if config.get("_class_name", CLASS_NAME) != CLASS_NAME:
        raise ValueError(f"{path} configures a {config['_class_name']}, not a {CLASS_NAME}")
    return config


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict onto the CPU in the dtype that it is stored in, old attention names replaced by today's.

    Raises:
        ValueError: the file is truncated, is no state dict, or mixes dtypes.
    """
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a damaged pickle's seek
            raise
        reason = "truncated or not a safetensors file" if isinstance(error, SafetensorError) else "unreadable"
        raise ValueError(f"{path} is {reason}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a state dict, tensors by name")
    dtypes = {value.dtype for value in state.values()}
    if len(dtypes) != 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"{path} holds dtypes {sorted(map(str, dtypes))}; it needs one floating-point dtype throughout"
        )
    return {_OLD_ATTENTION.sub(lambda m: f"{m[1]}.{_NEW_NAME[m[2]]}.{m[3]}", name): t for name, t in state.items()}


def check_weights(state: Mapping[str, Tensor], needed: Mapping[str, Tensor], path: Path) -> None:
    """Compares names and shapes with those that the configured network needs.

    Raises:
        ValueError: weights are missing, unexpected or of another shape, named.
    """
    wrong = [
        f"{name} is {list(state[name].shape)}, needs {list(tensor.shape)}"
        for name, tensor in needed.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in needed if name not in state],
        "unexpected": [name for name in state if name not in needed],
        "of another shape": wrong,
    }
    found = [f"{len(names)} weights {what} ({_abridged(names)})" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"{path} does not fit its {CONFIG}: {'; '.join(found)}")


def write(folder: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes both files. Each appears whole or not at all."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    # Row-major on the CPU: what the format asks for. "format" is what diffusers looks for before it loads.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    text = json.dumps({"_class_name": CLASS_NAME, **config}, indent=2) + "\n"
    with atomic_write(root / CONFIG) as config_file, atomic_write(root / SAFETENSORS) as weights_file:
        config_file.write(text.encode())
        weights_file.write(weights)


def _abridged(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
