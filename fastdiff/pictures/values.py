"""Arguments as JSON has them, tensors among them, with every bit."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import check_shape

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def to_plain(name: str, value: Any) -> Any:
    """A value as JSON has it: numbers, words, lists, objects; a tensor is an object {tensor, shape, values or zlib}.

    ValueError names what no recipe can hold, such as a function.
    """
    if isinstance(value, np.generic) and isinstance(plain := value.item(), (bool, int, float, str)):
        return plain
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _tensor_to_plain(name, value)
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Mapping) and "tensor" not in value and all(isinstance(key, str) for key in value):
        return {key: to_plain(f"{name}[{key!r}]", entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(f"{name}[{i}]", entry) for i, entry in enumerate(value)]
    raise ValueError(f"a recipe cannot hold {name}, a {type(value).__name__}")


def from_plain(value: Any) -> Any:
    """What ``to_plain`` was given, tuples as lists; tensors are on the CPU. ValueError for a tensor that is damaged."""
    if isinstance(value, dict):
        if "tensor" in value:
            return _tensor_from_plain(value)
        return {key: from_plain(entry) for key, entry in value.items()}
    return [from_plain(entry) for entry in value] if isinstance(value, list) else value


def unpacked_bytes(value: Any) -> int:
    """How many bytes the tensors in a plain value take: a text of a hundred may name gigabytes."""
    if isinstance(value, list):
        return sum(map(unpacked_bytes, value))
    if not isinstance(value, dict):
        return 0
    if "tensor" not in value:
        return sum(map(unpacked_bytes, value.values()))
    kind, shape = _layout(value)
    return math.prod(shape) * kind.itemsize


def _tensor_to_plain(name: str, tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"a recipe cannot hold {name}, a {tensor.layout} tensor of {dtype} on {tensor.device}")
    plain: dict[str, Any] = {"tensor": dtype, "shape": list(tensor.shape)}
    numbers = tensor.detach().cpu()
    if numbers.numel() and numbers.ndim:
        bits = numbers.reshape(len(numbers), -1).contiguous().view(torch.uint8)
        if bool((bits == bits[:1]).all()):
            numbers = numbers[:1]  # one image or one label for all samples is kept once
    if dtype.startswith(("int", "uint")):
        return {**plain, "values": numbers.reshape(-1).tolist()}
    return {**plain, "zlib": base64.b64encode(zlib.compress(as_bytes(numbers))).decode()}


def _tensor_from_plain(plain: dict[str, Any]) -> Tensor:
    kind, shape = _layout(plain)
    size = math.prod(shape) * kind.itemsize
    if size == 0:
        return torch.empty(shape, dtype=kind, device="cpu")
    try:
        if "values" in plain:
            numbers = torch.tensor(plain["values"], dtype=kind, device="cpu")
        else:
            unpacked = zlib.decompressobj().decompress(base64.b64decode(plain["zlib"], validate=True), size + 1)
            numbers = torch.from_numpy(np.frombuffer(unpacked, dtype=np.uint8).copy()).view(kind)
        kept_once = len(shape) > 0 and numbers.numel() * shape[0] == math.prod(shape)
        return numbers.reshape((1, *shape[1:]) if kept_once else shape).expand(shape).clone()
    except (ValueError, TypeError, RuntimeError, zlib.error) as error:
        raise ValueError(f"a tensor of the recipe is damaged: {error}") from None


def _layout(plain: dict[str, Any]) -> tuple[torch.dtype, tuple[int, ...]]:
    """A plain tensor's dtype and shape, checked."""
    dtype = plain["tensor"]
    known = isinstance(dtype, str) and dtype in DTYPES
    if not known or set(plain) - {"values", "zlib"} != {"tensor", "shape"} or len(plain) != 3:
        raise ValueError(f"a tensor of the recipe is damaged: its dtype is {dtype!r}, its keys are {', '.join(plain)}")
    try:
        return getattr(torch, dtype), check_shape("shape", [1, *plain["shape"]])[1:]
    except (ValueError, TypeError) as error:
        raise ValueError(f"a tensor of the recipe is damaged: {error}") from None


def as_bytes(tensor: Tensor) -> bytes:
    """A CPU tensor's numbers in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
