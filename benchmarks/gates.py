"""What contestants must agree on before they are timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastdiff

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


def only_noise(result: Tensor, mean: Tensor, sigma: float) -> None:
    """The result is ``mean`` plus sigma times standard normals, by their first two moments and largest value."""
    z = ((result.double() - mean.double()) / sigma).flatten()
    n = z.numel()
    assert abs(float(z.mean())) < 6 / math.sqrt(n), "the noise's mean is not 0"
    assert abs(float(z.var()) - 1) < 6 * math.sqrt(2 / n), "the noise's variance is not 1"
    assert float(z.abs().max()) < 7, "the noise has an impossible value"


def graphed(ours: Callable[[], Any], device: torch.device) -> dict[str, Callable[[], Any]]:
    """fastdiff's contestants: on a GPU its call as a node of a CUDA graph, which is how the loop runs it, and eager."""
    if device.type == "cpu":
        return {"fastdiff": ours}
    ours()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours()
    return {"fastdiff": graph.replay, "fastdiff, eager": ours}


def gpu_targets(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """What a GPU is asked for: bandwidth where there is enough work, few launches where there is little."""
    if shape == (64, 3, 32, 32):
        return [{"kind": "ratio", "contestant": "textbook", "goal": 20}]
    if shape == (64, 3, 256, 256):
        ratio = {"kind": "ratio", "contestant": "textbook", "goal": 6}
        return [ratio, {"kind": "of_copy", "contestant": "fastdiff", "goal": 0.85}]
    return []
