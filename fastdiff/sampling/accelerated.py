"""What a run asks of ``fastdiff.acceleration``: the only file of sampling that knows how a network was accelerated."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from fastdiff.acceleration.deep import DeepCalls
from fastdiff.acceleration.network import network_of, networks_in


def planned_embeddings(model: Any, times: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
    """An accelerated network's time embeddings of a plan's timesteps [rows, batch], all at once, and their tensors.

    The first ``.at(row)`` is a context in which the network's call takes those of one row; None where it has none. The
    guards of networks inside the model have looked at their weights when this returns.
    """
    accelerated = network_of(getattr(model, "planned_network", model))  # of a wrapper, the one that it hands t to
    for network in networks_in(model) if times.is_cuda else ():
        network.check(wait=True)
    planned = None if accelerated is None or times.shape[1] == 0 else accelerated.rows(times[:, 0])
    return planned, () if planned is None else (planned.emb, planned.projected)


def accelerated_deep_calls(model: Any, branch: int) -> DeepCalls:
    """Calls of a network that keep or take its deep features; ValueError where it was not accelerated."""
    found = networks_in(model) if isinstance(model, nn.Module) else []
    if len(found) != 1:
        raise ValueError(
            "rows that reuse deep features need a UNet of fastdiff.models or diffusers after "
            f"fastdiff.accelerate(model), or a network with a method forward_deep; this {type(model).__name__} "
            + (f"holds {len(found)} accelerated networks" if found else "is not accelerated")
        )
    return DeepCalls(model, found[0], branch)


def is_accelerated(model: Any) -> bool:
    """Whether a module itself was accelerated; a compiled one runs what it traced."""
    return network_of(model) is not None


def is_batch_invariant(model: Any) -> bool:
    """Whether an image's bits were promised not to depend on the batch, of a network or of one inside it."""
    return isinstance(model, nn.Module) and any(network.invariant for network in networks_in(model))


def fingerprint(model: Any) -> Hashable:
    """What differs once a module or one inside it is accelerated, restored, or written to."""
    return tuple(network.stamp() for network in networks_in(model))


def kept_weights(model: Any) -> list[Any]:
    """The packed weights of accelerated networks, and those they stand for: a graph holds the addresses of both."""
    return [network.kept_weights() for network in networks_in(model)]
