"""What contestants must agree on before they are timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastdiff

GPU = torch.cuda.is_available()
SCHEDULE = fastdiff.NoiseSchedule.linear()


class TextbookSchedule:
    """The schedule as a careful user of the textbook keeps it: in the state's dtype, moved to the device once."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.alphas_cumprod = SCHEDULE.alphas_cumprod.to(device, dtype)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """|a − b| ≤ tolerance·max(1, max|b|)."""
    error, bound = float((a - b).abs().max()), tolerance * max(1.0, float(b.abs().max()))
    assert error <= bound, f"contestants differ by {error:.3g}; {bound:.3g} is allowed"


def alike(a: Tensor, b: Tensor, tolerance: float) -> None:
    """‖a − b‖ ≤ tolerance·‖b‖, for whole runs in another dtype, where single values go their own ways."""
    error = float((a - b).norm() / b.norm())
    assert error <= tolerance, f"contestants differ by {error:.3g} of their size; {tolerance:.3g} is allowed"


def only_noise(result: Tensor, mean: Tensor, sigma: float) -> None:
    """The result is ``mean`` plus sigma times standard normals, by their first two moments and largest value."""
    z = ((result.double() - mean.double()) / sigma).flatten()
    n = z.numel()
    assert abs(float(z.mean())) < 6 / math.sqrt(n), "the noise's mean is not 0"
    assert abs(float(z.var()) - 1) < 6 * math.sqrt(2 / n), "the noise's variance is not 1"
    assert float(z.abs().max()) < 7, "the noise has an impossible value"


def graphed(ours: Callable[[], Any], device: torch.device) -> dict[str, Callable[[], Any]]:
    """fastdiff's contestants: on a GPU its call as a node of a CUDA graph, which is how the loop runs it, and eager."""
    return {"fastdiff": ours} if device.type == "cpu" else {"fastdiff": graph(ours), "fastdiff, eager": ours}


def graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """A replay of what a call runs on the GPU, so that launches from Python do not hide the kernels' own time."""
    call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call()
    return captured.replay


def kernels(call: Callable[[], Any]) -> int:
    """How many kernels a call runs on the GPU, those of a graph's nodes among them; copies and fills are not counted.

    The profiler may slow down what runs after it, so nothing is timed in a process that has counted.
    """
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)


def gpu_targets(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """What a GPU is asked for: bandwidth where there is enough work, few launches where there is little."""
    if shape == (64, 3, 32, 32):
        return [{"kind": "ratio", "contestant": "textbook", "goal": 20}]
    if shape == (64, 3, 256, 256):
        ratio = {"kind": "ratio", "contestant": "textbook", "goal": 6}
        return [ratio, {"kind": "of_copy", "contestant": "fastdiff", "goal": 0.85}]
    return []
