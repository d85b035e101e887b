"""Whether a network is worth accelerating for a run of our own commands, and the same for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastdiff.acceleration.accelerate import accelerate, restore
from fastdiff.acceleration.network import networks_in

# Below, a run is short in any case, and keeps its bits: the packaged digits' first picture is the same everywhere.
PARAMETERS = 1_000_000


def worthwhile(network: nn.Module) -> bool:
    """Whether a run of this network is long enough for ``accelerate`` to matter."""
    return not networks_in(network) and sum(p.numel() for p in network.parameters()) >= PARAMETERS


@contextmanager
def accelerated(
    network: nn.Module, dtype: torch.dtype = torch.float32, *, force: bool | None = None, batch_invariant: bool = False
) -> Iterator[None]:
    """A network in eval mode with its fast path for a while, where that is worthwhile and something in it is known.

    force: put it in, or leave it out, whatever is worthwhile; ValueError where nothing in the network is known.
    batch_invariant: as ``accelerate`` has it; it goes with force.
    """
    put = worthwhile(network) if force is None else force
    if put:
        try:
            accelerate(network, dtype=dtype, batch_invariant=batch_invariant)
        except ValueError:  # nothing in it is known
            if force:
                raise
            put = False
    try:
        yield
    finally:
        if put:
            restore(network)
