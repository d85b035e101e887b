"""Whether a network is worth accelerating for a run of our own commands, and the same for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastdiff.acceleration.accelerate import accelerate, restore
from fastdiff.acceleration.network import networks_in

PARAMETERS = 1 << 20  # below, little is saved of what is little; the packaged digits' first picture keeps its bits


def worthwhile(network: nn.Module) -> bool:
    """Whether ``accelerate`` shortens a run of this network by more than is worth speaking of."""
    return not networks_in(network) and sum(p.numel() for p in network.parameters()) >= PARAMETERS


@contextmanager
def accelerated(network: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """A network in eval mode with its fast path where that is worthwhile and something in it is known."""
    put = worthwhile(network)
    if put:
        try:
            accelerate(network, dtype=dtype)
        except ValueError:  # nothing in it is known
            put = False
    try:
        yield
    finally:
        if put:
            restore(network)
