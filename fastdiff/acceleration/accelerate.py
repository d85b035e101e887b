"""accelerate: the fast path put into a network or a pipeline, in place; restore takes it out again."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastdiff.acceleration import network as fast
from fastdiff.acceleration.blocks import Upsample
from fastdiff.acceleration.known import KINDS, UNETS, name_of
from fastdiff.acceleration.network import RECORD, Network
from fastdiff.checks import DTYPES

# What accelerate looks for in a pipeline, beside schedulers.
NETWORKS = (*UNETS, *fast.ENTRIES)


@dataclass(frozen=True)
class NetworkReport:
    """What ``accelerate`` changed in one network; prints as a table.

    Attributes:
        what: the network's class.
        dtype: of its arithmetic; its parameters keep their own.
        changed: (class, how many, what its modules now do), inner ones first.
        kept: (class, how many, why) of modules that could not be changed though their class is known.
    """

    what: str
    dtype: torch.dtype
    changed: tuple[tuple[str, int, str], ...]
    kept: tuple[tuple[str, int, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.what}, computing in {str(self.dtype).removeprefix('torch.')}, channels_last:"]
        rows = [(kind, str(count), does) for kind, count, does in self.changed]
        rows += [(kind, str(count), f"as it was: {why}") for kind, count, why in self.kept]
        kind, number = (max((len(row[i]) for row in rows), default=0) for i in range(2))
        return "\n".join(lines + [f"  {row[1]:>{number}} {row[0]:<{kind}}  {row[2]}" for row in rows])


@dataclass(frozen=True)
class Accelerated:
    """What ``accelerate`` changed; print it.

    Attributes:
        what: the class of the accelerated object.
        changed: the class before and the class after, by the component's name.
        kept: the class of each component that was left alone though it is a scheduler or a network, and why.
        networks: a report of each network, by the component's name; under "" that of the object itself.
    """

    what: str
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    networks: dict[str, NetworkReport] = field(default_factory=dict)

    def __str__(self) -> str:
        if "" in self.networks:
            return str(self.networks[""])
        lines = [f"{self.what}:"]
        lines += [f"  {name}: {before} -> {after}" for name, (before, after) in self.changed.items()]
        lines += [f"  {name}: {kept}, as it was" for name, kept in self.kept.items()]
        for name, report in self.networks.items():
            lines += [f"  {line}" for line in f"{name}: {report}".splitlines()]
        return "\n".join(lines)


def accelerate(target: Any, *, dtype: torch.dtype | str = "auto", exact_convolutions: bool = False) -> Accelerated:
    """Give a network, or a diffusers pipeline's schedulers and networks, their fast path, in place.

    Of a network, every module that is known computes the same function in fewer passes over memory: fused GroupNorm
    and SiLU, convolutions with weights packed once and the residual summed as the result is stored, on a CPU those of
    3×3 windows with fewer multiplications, one projection to queries, keys and values, up-sampling without the
    doubled image, the time embedding once for all steps of a plan, a prompt's keys and values once. Known are the
    blocks of ``fastdiff.models.UNet`` and of diffusers' UNet2DModel, UNet2DConditionModel and AutoencoderKL, and in
    any module its Conv2d, Linear, GroupNorm and LayerNorm, and GroupNorm followed by SiLU in a Sequential. What is
    not known, or not as usual, stays as it was, and the report says so. Parameters, state dict, hooks and classes
    do not change; weights that change later are seen. While gradients are recorded, in training mode and under
    torch.compile, the module's own code runs.

    A pipeline's schedulers become fastdiff's, of the same config and tables (``fastdiff.integrations.diffusers`` says
    where one differs on purpose), and its UNet and autoencoder are accelerated, unless they are already, for another
    pipeline, or in training mode.

    Args:
        target: a torch.nn.Module in eval mode, or a diffusers.DiffusionPipeline.
        dtype: of a network's arithmetic: float32, bfloat16 or float16. "auto" takes bfloat16 for a float32 network
            where the device computes in it natively (AVX-512-BF16 or AMX on a CPU, compute capability 8.0 of a GPU),
            and else the network's own. What comes out has the dtype that it had.
        exact_convolutions: compute convolutions as they stand. Else those of 3×3 windows may be of transformed weights
            (``ops.winograd_conv``, ``ops.upsample_conv``): equal in exact arithmetic, rounded otherwise, and a number
            that is not finite spreads farther.

    Returns:
        What was changed, for printing.

    Raises:
        TypeError: for anything else, and for a dtype that is none.
        ValueError: for what is accelerated already, in training mode, or has nothing in it that fastdiff knows; for a
            scheduler's config option that fastdiff does not serve, by name.
    """
    if dtype != "auto" and dtype not in DTYPES:
        kind = TypeError if not isinstance(dtype, (torch.dtype, str)) else ValueError
        raise kind(f'dtype must be "auto", torch.float32, torch.bfloat16 or torch.float16; got {dtype!r}')
    if not isinstance(exact_convolutions, bool):
        raise TypeError(f"exact_convolutions must be a bool; got {type(exact_convolutions).__name__}")
    target = _checked(target)
    if isinstance(target, nn.Module):
        reason = _why_not(target)
        if reason is not None:
            raise ValueError(f"this {type(target).__name__} is {reason}")
        return Accelerated(_name(target), networks={"": _report(_put(target, dtype, exact_convolutions))})
    return _accelerate_pipeline(target, dtype, exact_convolutions)


def _put(network: nn.Module, dtype: torch.dtype | str, exact: bool) -> fast.Network:
    return fast.put(network, _dtype(network, dtype), KINDS - {Upsample} if exact else KINDS, exact)


def _accelerate_pipeline(pipe: Any, dtype: torch.dtype | str, exact: bool) -> Accelerated:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from fastdiff.integrations import diffusers as ours

    if RECORD in pipe.__dict__:
        raise ValueError(f"this {type(pipe).__name__} is accelerated already; restore it first")
    schedulers = {name: value for name, value in pipe.components.items() if isinstance(value, SchedulerMixin)}
    made = {name: ours.like(scheduler) for name, scheduler in schedulers.items()}
    kept = {name: _name(schedulers[name]) for name, new in made.items() if new is None}
    networks = {name: value for name, value in pipe.components.items() if name_of(value) in NETWORKS}
    for name, network in list(networks.items()):
        reason = _why_not(network)
        if reason is not None:
            kept[name] = f"{_name(networks.pop(name))}, {reason}"
    if not any(made.values()) and not networks:
        found = "; ".join(f"{name} is {what}" for name, what in kept.items()) or "it has no scheduler"
        raise ValueError(f"fastdiff has nothing for this {type(pipe).__name__}: {found}")
    changed = {name: (schedulers[name], new) for name, new in made.items() if new is not None}
    put = {name: _put(network, dtype, exact) for name, network in networks.items()}
    for name, (_, new) in changed.items():
        setattr(pipe, name, new)
    pipe.__dict__[RECORD] = changed, put
    return Accelerated(
        _name(pipe),
        {name: (_name(old), _name(new)) for name, (old, new) in changed.items()},
        kept,
        {name: _report(network) for name, network in put.items()},
    )


def restore(target: Any) -> None:
    """Undo ``accelerate``: every forward is its class's, every component the object that it was.

    Raises:
        TypeError: for what accelerate does not take.
        ValueError: for what is not accelerated, or a part of which was replaced since.
    """
    target = _checked(target)
    record = target.__dict__.get(RECORD)
    if record is None:
        raise ValueError(f"this {type(target).__name__} is not accelerated")
    if isinstance(record, Network):
        fast.check(record)
        _take(record)
        return
    changed, put = record
    for name, (_, new) in changed.items():
        if getattr(target, name) is not new:
            raise ValueError(
                f"{name} was replaced since accelerate, by {_name(getattr(target, name))}; put it back first"
            )
    for network in put.values():
        fast.check(network)
    for network in put.values():
        _take(network)
    for name, (old, _) in changed.items():
        setattr(target, name, old)
    del target.__dict__[RECORD]


def _take(network: Network) -> None:
    fast.take(network)
    graph = sys.modules.get("fastdiff.sampling.graph")  # loaded with the first sampling
    if graph is not None:
        graph.forget(network.root)


def _checked(target: Any) -> Any:
    """A module (a compiled one's own), or a pipeline."""
    if isinstance(target, nn.Module):
        return getattr(target, "_orig_mod", target)
    diffusers = sys.modules.get("diffusers")  # whoever has a pipeline has imported it
    if diffusers is None or not isinstance(target, diffusers.DiffusionPipeline):
        raise TypeError(
            f"accelerate and restore take a torch.nn.Module or a diffusers pipeline; got {type(target).__name__}"
        )
    return target


def _why_not(network: nn.Module) -> str | None:
    """Why a network cannot be accelerated as it is, or None."""
    if any(RECORD in module.__dict__ for module in network.modules()):
        return "accelerated already, or a part of it; restore that first"
    return "in training mode; call eval() first" if network.training else None


def _dtype(network: nn.Module, dtype: torch.dtype | str) -> torch.dtype:
    return fast.native_dtype(network) if isinstance(dtype, str) else dtype


def _report(network: Network) -> NetworkReport:
    return NetworkReport(_name(network.root), network.context.dtype, tuple(network.counts()), tuple(network.reasons()))


def _name(value: Any) -> str:
    return f"{type(value).__module__.split('.')[0]}.{type(value).__name__}"
