"""The compiled extension: whether it is there, and what crosses into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fastdiff.noise import NoiseKey
from fastdiff.ops.view import Strides, strides_of

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@lru_cache(maxsize=1)
def extension() -> ModuleType | str:
    """The module fastdiff._C, or why it cannot be imported."""
    try:
        from fastdiff import _C  # type: ignore[attr-defined,unused-ignore]  # torch.compile does not follow import_module
    except ImportError as error:
        return (
            f"the extension is not built or does not load: {error}; with a C++17 compiler on the PATH, installing "
            "fastdiff again builds it, and FASTDIFF_NATIVE=ON shows what fails"
        )
    return _C


def bfloat16() -> str:
    """What the CPU multiplies bfloat16 numbers with: "matrix" (AMX), "vector", or "" where none is known."""
    module = extension()
    return "" if isinstance(module, str) else module.cpu_bfloat16()


@lru_cache(maxsize=16)
def missing(device_type: str, op: str = "randn") -> str | None:
    """Why the native backend cannot serve an operation on a device type, or None where it can."""
    module = extension()
    if isinstance(module, str):
        return module
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"there are no native kernels for {device_type!r} devices"
    if not module.with_cuda:
        return "the extension was built without CUDA"
    if not hasattr(module, f"{op}_cuda"):
        return f"{op} has no native kernel for it"
    try:
        count = module.cuda_device_count()
    except RuntimeError as error:
        return f"its CUDA runtime does not start under the installed driver: {error}"
    return None if count else "its CUDA runtime finds no device"


def view(module: ModuleType, tensor: Tensor):  # -> _C.View
    """The View of a [B, …] tensor whose strides a kernel can walk (ops.view.viewable)."""
    if tensor.is_contiguous():
        n = tensor.numel() // (tensor.shape[0] or 1)
        return module.View(tensor.data_ptr(), DTYPES[tensor.dtype], n, n or 1, 0, 1)
    strides: Strides | None = strides_of(tensor)
    assert strides is not None
    return module.View(tensor.data_ptr(), DTYPES[tensor.dtype], *strides)


def key(module: ModuleType, noise_key: NoiseKey):  # -> _C.NoiseKey
    if noise_key.seeds is None:
        return module.NoiseKey(noise_key.seed, noise_key.sample_offset)
    return module.NoiseKey(0, 0, address(noise_key.seeds), address(noise_key.samples))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def launch(module: ModuleType, op: str, params: object, device: torch.device) -> None:
    """Run <op>_cpu on torch's number of threads, or <op>_cuda on the current stream of the tensors' device."""
    if device.type == "cpu":
        getattr(module, f"{op}_cpu")(params, torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            getattr(module, f"{op}_cuda")(params, torch.cuda.current_stream(device).cuda_stream)


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """torch's number of threads, which fastdiff's kernels run on too, for a while."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at(module: ModuleType, op: str, device: torch.device) -> tuple[Callable[..., None], Callable[[], int]]:
    """<op>_cpu_at or <op>_cuda_at, and what gives its second argument: torch's number of threads, or the stream."""
    if device.type == "cpu":
        return getattr(module, f"{op}_cpu_at"), torch.get_num_threads
    run = getattr(module, f"{op}_cuda_at")

    def on_device(*args: object) -> None:
        with torch.cuda.device(device):
            run(*args)

    return on_device, lambda: torch.cuda.current_stream(device).cuda_stream
