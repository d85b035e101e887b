"""What was built, what would be chosen, and why: ``fastdiff.info()`` and ``fastdiff info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from fastdiff.ops import native
from fastdiff.ops.backend import FUSED, TABLES, VARIABLE, chip_of, choose, entry_for, why_missing

DISTRIBUTION = "fastdiff-torch"
NAMESAKE = "fastdiff"  # another project's distribution, which installs a package of the same name
OPERATIONS = ("randn", "add_noise", "update", "conv_epilogue")  # without a table


def info() -> None:
    """Print what fastdiff was built with and which backend each operation takes on each device, and why."""
    print(report())


def report() -> str:
    """The text that ``info`` prints."""
    lines = [
        f"fastdiff {_version(DISTRIBUTION)}, torch {torch.__version__}, triton {_version('triton')}, "
        f"Python {platform.python_version()}",
        *_namesake(),
        f"native extension: {_built()}",
        f"devices: {', '.join(_devices())}; {torch.get_num_threads()} threads on the CPU",
        f"{VARIABLE}: {os.environ.get(VARIABLE) or 'not set'}",
        "",
    ]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        try:
            lines += [f"{op + ' on ' + device:<25} {choose('auto', device, op)}" for op in OPERATIONS]
            for op in TABLES:
                lines += _table(op, torch.device(device))
        except (RuntimeError, ValueError) as error:
            lines.append(f"on {device}: {error}")
        for backend in FUSED:
            reason = why_missing(backend, device)
            if reason is not None:
                lines.append(f"  no {backend}: {reason}")
    return "\n".join(lines)


def _table(op: str, device: torch.device) -> list[str]:
    """An operation's rules on a device, in the order in which they are asked."""
    entry = entry_for(op, device)
    head = f"{op + ' on ' + device.type:<25} by choice.json for {chip_of(device)} ({entry.source}):"
    return [head, *(f"  {rule}" for rule in entry.rules)]


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


def _namesake() -> list[str]:
    if _version(NAMESAKE) == "not installed":
        return []
    return [
        f"warning: the distribution {NAMESAKE} {_version(NAMESAKE)}, a text differ, is installed too. Both are "
        f"imported as 'fastdiff' and overwrite each other's files: uninstall both, then install {DISTRIBUTION}"
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
