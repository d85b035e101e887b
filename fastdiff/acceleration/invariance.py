"""``accelerate(…, batch_invariant=True)``: an image's bits do not depend on the batch that it is computed in.

What makes them depend on it: a library chooses the tiles of a matrix product and the vector tails of an exponential by
the size of the whole batch. So nothing that a library computes is given more than one sample, copied to memory of its
own (``ops.alone``). The whole batch is given to three kinds of code alone, in which a result is a function of its own
sample's numbers, whatever is beside them:

- kernels of ours that are written so: GroupNorm, whose sums are a group's own, and Winograd's convolution, whose sums
  are a window's own, compiled without contraction, so that a vector's lanes and its tail agree;
- operations that round a single exact result, or none: sums, products, quotients, casts, copies, look-ups. Their bits
  are IEEE 754's, in a vector and in its tail;
- the forwards of PLAIN classes, which do nothing but these and call their parts.

Any other module is called sample by sample, as a whole: nothing needs to be known of what is inside. Where one of
another kind stands between those that are known, or something was exchanged since, the whole network is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration.blocks import Up
from fastdiff.acceleration.known import name_of
from fastdiff.acceleration.module import StandIn, arrange, hooked, replaced_method
from fastdiff.ops import native
from fastdiff.ops.alone import alone
from fastdiff.ops.backend import FUSED, from_environment

_BLOCKS = "diffusers.models.unets.unet_2d_blocks."
# Whose own forwards add, scale, concatenate and look up, and leave the rest to their parts.
PLAIN = (
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.sparse.Embedding",
    "fastdiff.models.unet.UNet",
    "fastdiff.models.unet.DownBlock",
    "fastdiff.models.unet.MidBlock",
    "diffusers.models.unets.unet_2d.UNet2DModel",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
    "diffusers.models.autoencoders.vae.Encoder",
    "diffusers.models.autoencoders.vae.Decoder",
    *(f"{_BLOCKS}{name}" for name in (
        "DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2D", "UNetMidBlock2DCrossAttn",
        "DownEncoderBlock2D", "UpDecoderBlock2D",
    )),
)  # fmt: skip


def unknown_in(module: nn.Module, stand_ins: Mapping[nn.Module, StandIn]) -> Iterator[nn.Module]:
    """The modules without a stand-in, and of which nothing is known, that PLAIN forwards and up blocks call."""
    if module in stand_ins and not isinstance(stand_ins[module], Up):
        return
    if module not in stand_ins and name_of(module) not in PLAIN:
        yield module
        return
    for child in module.children():
        yield from unknown_in(child, stand_ins)


def reason_apart(module: nn.Module, stand_ins: Mapping[nn.Module, StandIn]) -> str | None:
    """Why a part of a network cannot be given a whole batch, so that the network is called sample by sample; or None.

    None, too, where that part alone is called sample by sample.
    """
    name, stand_in, forward = type(module).__name__, stand_ins.get(module), module.__dict__.get("forward")
    if hooked(module):
        return f"a {name} in it has hooks"
    if forward is not stand_in:
        return f"the forward of a {name} in it is not its class's"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return f"a {name} in it is compiled"
    kernel = getattr(stand_in, "inner", stand_in)
    if kernel is not None and (not isinstance(kernel, Up) or kernel.reason is not None):
        return None
    if kernel is None and name_of(module) not in PLAIN:
        return f"the code of a {name} in it is not known"
    replaced = type(module) is not nn.ModuleList and replaced_method(module)  # a list has no forward
    if replaced or getattr(stand_in, "previous", None) is not None:
        return f"the forward of a {name} in it is not its class's"
    return next(filter(None, (reason_apart(child, stand_ins) for child in module.children())), None)


def reason_for_kernels(device: torch.device) -> str | None:
    """Why no kernel of ours is given a whole batch on a device; None where it is."""
    if device.type != "cpu":
        return "a GPU's kernels are chosen by what they are given"
    missing = native.missing("cpu", "group_norm_silu")
    if missing is not None:
        return "the C++ kernels are missing"
    return None if from_environment(FUSED) in (None, "native") else "FASTDIFF_BACKEND names PyTorch's operations"


def refusal(root: nn.Module, entries: list[nn.Module]) -> str | None:
    """Why the bits of a network's results cannot be made the same in every batch, or None."""
    for name, module in root.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return f"{name or 'it'} is a {type(module).__name__} without running statistics: it takes the batch's"
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            return f"{name or 'it'} is a {type(module).__name__}, which cuts the batch: accelerate the module in it"
    hooks = next((type(module).__name__ for module in entries if hooked(module)), None)
    return None if hooks is None else f"the hooks of its {hooks} see the whole batch"


# ---- one sample of the arguments, and all samples' results


def batch_of(stand_in: StandIn, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The samples of a call: the first dimension of its first tensor that has another one."""
    arranged = arrange(type(stand_in.module), args, dict(kwargs))
    tensors = [t for t in (args + tuple(kwargs.values()) if arranged is None else arranged) if isinstance(t, Tensor)]
    shapes = [t.shape for t in tensors if t.ndim > 1] or [t.shape for t in tensors if t.ndim]
    return shapes[0][0] if shapes else 1


def one_of(value: Any, i: int, batch: int, where: str, multiples: bool) -> Any:
    """Sample i of a structure of arguments: of tensors of ``batch`` entries its own, those of one entry as they are.

    multiples: tensors may have several entries a sample, side by side.
    """
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value
        rows, rest = divmod(len(value), batch)
        if rows == 1 or (multiples and rows > 1 and not rest):
            return alone(value, i, rows)
        if len(value) == 1:
            return alone(value, 0)
        raise ValueError(
            f"batch_invariant calls {where} sample by sample: tensors must have {batch} entries, one a sample, or one "
            f"for all; got {list(value.shape)}"
        )
    if isinstance(value, Mapping):
        return {name: one_of(entry, i, batch, where, multiples) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        entries = [one_of(entry, i, batch, where, multiples) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def joined(results: list[Any], where: str) -> Any:
    """The result of a batch, of those of its samples: tensors one after another, and what is the same in all."""
    first = results[0]
    if any(type(result) is not type(first) for result in results):
        raise ValueError(f"{where} returned {', '.join(sorted({type(r).__name__ for r in results}))} for its samples")
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(results)
    if first is None or isinstance(first, (bool, int, float, str)):
        if any(result != first for result in results):
            raise ValueError(f"{where} returned other values for other samples: {first!r} and others")
        return first
    if isinstance(first, (tuple, list)) and all(len(result) == len(first) for result in results):
        entries = [joined(list(entry), where) for entry in zip(*results, strict=True)]
        return type(first)(*entries) if hasattr(first, "_fields") else type(first)(entries)
    if isinstance(first, dict) and all(result.keys() == first.keys() for result in results):
        merged = {name: joined([result[name] for result in results], where) for name in first}
        return merged if type(first) is dict else type(first)(**merged)  # the outputs of diffusers and transformers
    what = "a tensor without dimensions" if isinstance(first, Tensor) else type(first).__name__
    raise ValueError(f"{where} returned {what}, which of one sample and the next is not one of a batch")


def each(call: Callable[..., Any], args: Any, kwargs: Any, batch: int, where: str, multiples: bool) -> Any:
    """``call`` of each sample alone, and its results as those of the batch."""
    results = [
        call(*one_of(args, i, batch, where, multiples), **one_of(kwargs, i, batch, where, multiples))
        for i in range(batch)
    ]
    return joined(results, where)
