"""The time embedding's way into the blocks: all their projections as one, and once for all rows of a plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.acceleration.module import Fast, Made

COUNTERS = 1024  # more than a convolution whose tiles are shared has (ops.conv makes its own where that is not so)


class Conditioning:
    """What the residual blocks of a network add to their channels: the projected embedding and a convolution's bias.

    Blocks register themselves; ``rows`` projects an embedding for all of them in one product, in float32, and keeps the
    last one, which every block of a call asks for. Under a known plan ``Rows`` has those of every timestep.
    """

    def __init__(self) -> None:
        self.blocks: list[Any] = []
        self.bounds: list[int] = [0]
        self._weights: Made[tuple[Tensor, Tensor]] = Made()
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def add(self, block: Any) -> int:
        """Count in a residual block; returns its number."""
        self.blocks.append(block)
        self.bounds.append(self.bounds[-1] + block.time_emb_proj.out_features)
        return len(self.blocks) - 1

    def __call__(self, temb: Tensor, number: int) -> Tensor:
        """What block ``number`` adds: float32 [B or 1, C]."""
        local = self.local
        if local.get("temb") is not temb:
            local["temb"], local["rows"] = temb, self.project(temb)
        return local["rows"][:, self.bounds[number] : self.bounds[number + 1]]

    @property
    def local(self) -> dict[str, Any]:
        """What this thread remembers of its call."""
        return self._local.__dict__

    def counters(self, device: torch.device) -> Tensor:
        """Zeros that the convolutions of this thread's call count in, one after another (ops.conv)."""
        local = self.local
        if "counters" not in local or local["counters"].device != device:
            local["counters"] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        return local["counters"]

    def project(self, temb: Tensor) -> Tensor:
        """Every block's row for an embedding [B, D]: float32 [B, sum of channels]."""
        sources = [p for b in self.blocks for p in (b.time_emb_proj.weight, b.time_emb_proj.bias, b.conv1.bias)]

        def joined() -> tuple[Tensor, Tensor]:
            weight = torch.cat([b.time_emb_proj.weight for b in self.blocks]).float()
            biases = [(b.time_emb_proj.bias, b.conv1.bias, b.time_emb_proj) for b in self.blocks]
            zeros = (weight.new_zeros(p.out_features) for *_, p in biases)
            total = [
                sum((t.float() for t in pair if t is not None), start=z)
                for (*pair, _), z in zip(biases, zeros, strict=True)
            ]
            return weight, torch.cat(total)

        weight, bias = self._weights.get(sources, joined)
        return F.linear(F.silu(temb.float()), weight, bias)


class Rows:
    """The embedding and the blocks' rows of each timestep of a plan, computed at once: [rows, D] and [rows, ΣC]."""

    def __init__(self, model: Any, conditioning: Conditioning, times: Tensor) -> None:
        self.conditioning = conditioning
        self.emb = model.time_embedding.forward.original(
            model.time_proj.forward.original(times).to(model.time_embedding.linear_1.weight.dtype)
        )
        self.projected = conditioning.project(self.emb)

    @contextmanager
    def at(self, index: int | Tensor) -> Iterator[None]:
        """While the network is called in row ``index`` (a number, or an int64 tensor [1] on the device)."""
        if isinstance(index, int):
            row = self.emb[index : index + 1], self.projected[index : index + 1]
        else:
            row = self.emb.index_select(0, index), self.projected.index_select(0, index)
        local = self.conditioning.local
        local["planned"] = row
        try:
            yield
        finally:
            local.clear()


class TimeProjection(Fast):
    """The sinusoid of t, which a planned row does not need."""

    does = "once for all timesteps of a plan"

    def run(self, timesteps: Tensor) -> Tensor:
        planned = self.conditioning.local.get("planned")
        return self.original(timesteps) if planned is None else planned[0]


class TimeEmbedding(Fast):
    """The embedding's MLP, in its own dtype; under a plan, a row of its results."""

    does = "once for all timesteps of a plan"

    def run(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        local = self.conditioning.local
        if "planned" in local and condition is None:
            local["temb"], local["rows"] = local["planned"]
            return local["temb"]
        return self.original(sample) if condition is None else self.original(sample, condition)
