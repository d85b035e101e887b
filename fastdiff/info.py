"""What was built, what would be chosen, and why: ``fastdiff.info()`` and ``fastdiff info``."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform

import torch

from fastdiff.ops import native
from fastdiff.ops.attention.backends import choice
from fastdiff.ops.backend import BACKENDS, VARIABLE, choose, why_missing
from fastdiff.ops.conv2d.winograd import suits

OPERATIONS = ("randn", "add_noise", "update", "group_norm_silu", "conv_epilogue")
# What serves on a GPU by the shapes of a call, not by the operation alone.
MIXED = (
    "  group_norm_silu: native for large or narrow groups that fit a block, else triton",
    "  conv in an accelerated network: triton where it was faster than the library on an H100, else the library",
)


def info() -> None:
    """Print what fastdiff was built with and which backend each operation takes on each device, and why."""
    print(report())


def report() -> str:
    """The text that ``info`` prints."""
    lines = [
        f"fastdiff {_version('fastdiff')}, torch {torch.__version__}, triton {_version('triton')}, "
        f"Python {platform.python_version()}",
        f"native extension: {_built()}",
        f"devices: {', '.join(_devices())}; {torch.get_num_threads()} threads on the CPU",
        f"{VARIABLE}: {os.environ.get(VARIABLE) or 'not set'}",
        "",
    ]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        try:
            lines += [f"{op + ' on ' + device:<25} {choose('auto', device, op)}" for op in OPERATIONS]
            if device == "cuda":
                lines += MIXED
            else:
                lines += _winograd()
            lines += _attention(device)
        except (RuntimeError, ValueError) as error:
            lines.append(f"on {device}: {error}")
        for backend in BACKENDS:
            reason = why_missing(backend, device)
            if reason is not None:
                lines.append(f"  no {backend}: {reason}")
    return "\n".join(lines)


def _attention(device: str) -> list[str]:
    """A line for each run of head sizes that take the same backend for the same reason."""
    lines: list[str] = []
    for size, keys in itertools.product((16, 40, 64, 128, 256, 512), (77, 1024)):
        backend, why = choice(device, torch.bfloat16, size, keys)
        line = f"{'attention on ' + device:<25} {backend} ({why})"
        if line not in lines:
            lines.append(line)
    return lines


def _winograd() -> list[str]:
    weight = torch.empty(64, 64, 3, 3)
    dtypes = [str(d).removeprefix("torch.") for d in native.DTYPES if suits(torch.empty(1, 64, 8, 8, dtype=d), weight)]
    served = f"native (winograd_conv) of {', '.join(dtypes)} from 32 channels on, else " if dtypes else ""
    return [f"  3x3 conv in an accelerated network: {served}the library"]


def _built() -> str:
    module = native.extension()
    if isinstance(module, str):
        return module
    cuda = "without CUDA"
    if module.with_cuda:
        major, minor = divmod(module.cuda_version, 1000)
        cuda = f"with CUDA {major}.{minor // 10} for sm_80, sm_90 and newer"
    return f"C++ for the CPU ({module.cpu_simd()} here), {cuda}"


def _devices() -> list[str]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [*names, f"CPU ({platform.machine()})"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
