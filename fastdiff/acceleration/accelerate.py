"""accelerate: the fast path put into a network or a pipeline, in place; restore takes it out again."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from fastdiff.acceleration import pipeline
from fastdiff.acceleration.blocks import Upsample
from fastdiff.acceleration.known import KNOWN
from fastdiff.acceleration.network import INSTALLING, RECORD, Network, install, network_of, networks_in
from fastdiff.acceleration.pipeline import Asked
from fastdiff.acceleration.report import Accelerated, class_name
from fastdiff.checks import DTYPES

# Bytes of a block that is made and freed once. glibc gives memory back to the system when twice the largest block that
# was ever freed lies idle (those of up to 32 MiB count), and the next call takes it again page by page, which took 1.5
# to 4% of the CIFAR-10 network's time at batch 8 in bfloat16.
FREED_ONCE = (32 << 20) - (64 << 10)


def accelerate(
    target: Any,
    *,
    dtype: torch.dtype | str = "auto",
    exact_convolutions: bool = False,
    batch_invariant: bool = False,
) -> Accelerated:
    """Give a network, or a diffusers pipeline's schedulers and networks, their fast path, in place.

    Of a network, every module that is known computes the same function in fewer passes over memory: fused GroupNorm
    and SiLU, convolutions with weights packed once and the residual summed as the result is stored, on a CPU those of
    3×3 windows with fewer multiplications, one projection to queries, keys and values, up-sampling without the
    doubled image, the time embedding once for all steps of a plan, a prompt's keys and values once. Known are the
    blocks of ``fastdiff.models.UNet`` and of diffusers' UNet2DModel, UNet2DConditionModel and AutoencoderKL, and in
    any module its Conv2d, Linear, GroupNorm and LayerNorm, and a Sequential's GroupNorm with SiLU. What is not known,
    or not as usual, stays as it was, and the report says so. Parameters, state dict, hooks and classes do not change.

    Before each call what the fast path assumed is compared with the network: layers, forwards, hooks, options,
    weights (a few numbers of each, too). Where something was exchanged, a LoRA loaded, say, the module's own code runs
    there, and the report says so; weights that were written to, however, are packed again. ``refresh`` says it
    outright. With gradients recorded (so call it under ``torch.no_grad()``), in training mode, under autocast,
    torch.compile, torch.jit.trace, torch.export, and function transforms such as vmap, the network's own code runs.

    On a CPU a call of a network that is known as a whole, and that takes less than a quarter of a second, is written
    down after sixteen of its layout and replayed from then on, without the network's Python (``replay.py``).

    A pipeline's schedulers become fastdiff's, of the same config and tables (``fastdiff.integrations.diffusers`` says
    where one differs on purpose), and its networks are accelerated, or named in the report with the reason why not.

    A second call with the same arguments changes nothing and returns the same report, which tells the present.

    Args:
        target: a torch.nn.Module in eval mode, a diffusers.DiffusionPipeline, or what ``fastdiff.load`` returns.
        dtype: of a network's arithmetic: float32, bfloat16 or float16. "auto" takes bfloat16 for a float32 network of
            which every block is known, where the device computes in it natively (AVX-512-BF16 or AMX on a CPU, compute
            capability 8.0 of a GPU), and else the network's own. A network that is moved to another dtype afterwards
            is computed in that. What comes out has the dtype that went in.
        exact_convolutions: compute convolutions as they stand. Else those of 3×3 windows may be of transformed weights
            (``ops.conv2d``): equal in exact arithmetic, rounded otherwise, and a number that is not finite spreads
            farther.
        batch_invariant: promise that an image's bits depend neither on the batch's size, nor on its place in it, nor
            on the other images, on equal hardware, threads and versions. What a library computes is then called sample
            by sample, with memory of its own for each (``acceleration/invariance.py``), and so is every module of
            which nothing is known; the report says which. Tensors that the network is given must have an entry a
            sample, in the order of its first one, or one for all. A network whose images look at each other, as
            frames do, no longer does so. With gradients and under autocast its own code runs sample by sample; in
            training mode and under torch.compile it raises RuntimeError. A pipeline's text and image encoders are
            called so, too.

    Returns:
        What was changed, for printing.

    Raises:
        TypeError: for anything else, and for a dtype that is none.
        ValueError: for what is accelerated already with other arguments, in training mode, or has nothing in it that
            fastdiff knows; and where batch_invariant cannot be promised, saying which module and why.
    """
    if not isinstance(dtype, (torch.dtype, str)) or dtype not in ("auto", *DTYPES):
        kind = TypeError if not isinstance(dtype, (torch.dtype, str)) else ValueError
        raise kind(f'dtype must be "auto", torch.float32, torch.bfloat16 or torch.float16; got {dtype!r}')
    for name, value in (("exact_convolutions", exact_convolutions), ("batch_invariant", batch_invariant)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool; got {type(value).__name__}")
    target, asked = _checked(target), Asked(dtype, exact_convolutions, batch_invariant)
    if isinstance(target, nn.Module):
        return accelerate_network(target, asked)
    return pipeline.accelerate(target, accelerate_network, _remove, asked)


def accelerate_network(network: nn.Module, asked: Asked) -> Accelerated:
    """``accelerate`` for a network; ValueError says why one cannot be."""
    with INSTALLING:
        return _accelerate_network(network, asked)


def _accelerate_network(network: nn.Module, asked: Asked) -> Accelerated:
    found = network_of(network)
    if found is not None and found.accelerated is not None:
        if Asked(found.requested, found.exact, found.invariant) == asked:
            return found.accelerated
        also = " and batch_invariant=True" if found.invariant else ""
        raise ValueError(
            f"this {type(network).__name__} is accelerated already, with dtype={found.requested!r} and "
            f"exact_convolutions={found.exact}{also}; restore it first"
        )
    if networks_in(network):
        raise ValueError(f"this {type(network).__name__} is accelerated already, in part; restore that first")
    if network.training:
        raise ValueError(f"this {type(network).__name__} is in training mode; call eval() first")
    kinds = {name: kind for name, kind in KNOWN.items() if kind is not Upsample} if asked.exact else KNOWN
    put = install(network, asked.dtype, asked.exact, kinds, asked.invariant)
    torch.UntypedStorage(FREED_ONCE)
    put.accelerated = Accelerated(class_name(network), networks={"": put.report()})
    return put.accelerated


def restore(target: Any) -> None:
    """Undo ``accelerate``: every forward is what it was, every component the object that it was.

    What others did since stays: a forward that was put around ours (it then calls the module's own), a scheduler that
    was put into a pipeline.

    Raises:
        TypeError: for what accelerate does not take.
        ValueError: for what is not accelerated.
    """
    record = _record(target)
    if isinstance(record, Network):
        _remove(record)
    else:
        pipeline.restore(_checked(target), record, _remove)


def refresh(target: Any) -> None:
    """Drop all that was derived from the weights of an accelerated network or pipeline; the next call makes it anew.

    Changes are seen without this where they touch the sampled numbers of a weight, its version or its place, as
    optimisers, averages, adapters and loading do. A write of single elements through ``.data`` needs it.

    Raises:
        TypeError: for what accelerate does not take.
        ValueError: for what is not accelerated.
    """
    record = _record(target)
    for network in [record] if isinstance(record, Network) else record.networks:
        network.renew()


def _record(target: Any) -> Any:
    target = _checked(target)
    record = target.__dict__.get(RECORD)
    if record is None:
        raise ValueError(f"this {type(target).__name__} is not accelerated")
    return record


def _remove(network: Network) -> None:
    network.remove()
    graph = sys.modules.get("fastdiff.sampling.graph")  # loaded with the first sampling
    if graph is not None:
        graph.forget(network.root)


def _checked(target: Any) -> Any:
    """A module (a compiled one's own), or diffusers' pipeline (of ``fastdiff.load``'s, the one that it holds)."""
    if isinstance(target, nn.Module):
        return getattr(target, "_orig_mod", target)
    words = sys.modules.get("fastdiff.text.pipeline")  # whoever has one of its objects has imported it
    if words is not None and isinstance(target, words.Pipeline):
        target = target.pipe
    diffusers = sys.modules.get("diffusers")  # whoever has a pipeline has imported it
    if diffusers is None or not isinstance(target, diffusers.DiffusionPipeline):
        raise TypeError(
            "accelerate, refresh and restore take a torch.nn.Module or a diffusers pipeline; "
            f"got {type(target).__name__}"
        )
    return target
