"""The time embedding's way into the blocks: all their projections as one, and once for all rows of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.acceleration.module import StandIn

if TYPE_CHECKING:
    from fastdiff.acceleration.network import Network


class TimeEmbeddings:
    """What the residual blocks of a network add to their channels: the projected embedding and a convolution's bias.

    ``project`` makes those of all blocks in one product, in float32; the last embedding's are remembered for the call
    of the network that goes on, in which every block asks for its own. Under a known plan ``PlannedEmbeddings`` has
    those of every timestep.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.register([])

    def register(self, blocks: list[Any]) -> None:
        """Take the residual blocks whose stand-ins are in use, and number them."""
        self.blocks, self.bounds = blocks, [0]
        for number, block in enumerate(blocks):
            block.number = number
            self.bounds.append(self.bounds[-1] + block.module.time_emb_proj.out_features)
        self.forget()

    def forget(self) -> None:
        """Drop the joined weights."""
        self.joined: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"joined": None}

    def added(self, temb: Tensor, number: int) -> Tensor:
        """What block ``number`` adds: float32 [B or 1, C]."""
        local = self.network.local
        # An embedding that is written to between two blocks is another one; inference tensors cannot tell.
        version = None if temb.is_inference() else temb._version
        if local.temb is not temb or local.version != version:
            local.temb, local.version = temb, version
            local.rows = self.network.by_sample(self.project, (temb,))
        return local.rows[:, self.bounds[number] : self.bounds[number + 1]]

    def project(self, temb: Tensor) -> Tensor:
        """Every block's row for an embedding [B, D]: float32 [B, sum of channels]."""
        joined, blocks = self.joined, self.blocks
        if joined is None:
            joined = self._join()
            if not (temb.is_cuda and torch.cuda.is_current_stream_capturing()):
                with self.network.lock:
                    if self.blocks is blocks:  # else another thread has seen weights change meanwhile
                        self.joined = joined
        return F.linear(F.silu(temb.float()), *joined)

    @torch.no_grad()
    def _join(self) -> tuple[Tensor, Tensor]:
        modules = [block.module for block in self.blocks]
        weight = torch.cat([m.time_emb_proj.weight for m in modules]).float()
        biases = []
        for m in modules:
            total = weight.new_zeros(m.time_emb_proj.out_features)
            for bias in (m.time_emb_proj.bias, m.conv1.bias):
                total = total if bias is None else total + bias.float()
            biases.append(total)
        return weight, torch.cat(biases)


class PlannedEmbeddings:
    """The embedding and the blocks' rows of each timestep of a plan, computed at once: [rows, D] and [rows, ΣC]."""

    def __init__(self, network: Network, times: Tensor) -> None:
        model: Any = network.root
        self.network, self.epoch = network, network.epoch
        sinusoids = model.time_proj.forward.original(times)
        self.emb = model.time_embedding.forward.original(sinusoids.to(model.time_embedding.linear_1.weight.dtype))
        self.projected = network.embeddings.project(self.emb)

    @contextmanager
    def at(self, index: int | Tensor) -> Iterator[None]:
        """While the network is called in row ``index`` (a number, or an int64 tensor [1] on the device)."""
        if isinstance(index, int):
            row = self.emb[index : index + 1], self.projected[index : index + 1]
        else:
            row = self.emb.index_select(0, index), self.projected.index_select(0, index)
        local = self.network.local
        local.planned = (self.epoch, *row)
        try:
            yield
        finally:
            local.planned = None


class TimeProjection(StandIn):
    """The sinusoid of t, which a planned row does not need."""

    summary = "once for all timesteps of a plan"
    of_batch = ""

    def run(self, timesteps: Tensor) -> Tensor:
        planned = self.network.planned_row()
        return self.network.by_sample(self.original, (timesteps,)) if planned is None else planned[0]


class TimeEmbedding(StandIn):
    """The embedding's MLP, in its own dtype; under a plan, a row of its results."""

    summary = "once for all timesteps of a plan"
    of_batch = ""

    def run(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        local, planned = self.network.local, self.network.planned_row()
        if planned is None or condition is not None:
            return self.network.by_sample(self.original, (sample,) if condition is None else (sample, condition))
        local.temb, local.rows = planned
        local.version = None if local.temb.is_inference() else local.temb._version
        return local.temb
