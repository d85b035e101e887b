"""Single layers: convolutions and projections with packed weights, normalisations, and what a Sequential pairs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.acceleration.module import ADDRESS, StandIn, hooked, replaced_method, stand_in_of, weights_reason, wide
from fastdiff.ops.conv2d import bind as bind_conv2d
from fastdiff.ops.group_norm_silu import bind as bind_group_norm_silu
from fastdiff.ops.linear import bind as bind_linear
from fastdiff.ops.linear import packing_pays

# Numbers of a weight below which a stand-in's few microseconds cost more than its packed weights brought, measured on
# two CPUs: a network of depthwise and 1×1 convolutions, and projections of 256 to 1536 channels.
SMALL_POINTWISE = 1 << 15
SMALL_LINEAR = 1 << 17


LIBRARY = "library's convolutions sample by sample"  # in a batch-invariant network; Winograd's are of all samples


class Layer(StandIn):
    """A layer with a weight and a bias. Amid code that is not known its result has its input's dtype."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return weights_reason(module)

    def result(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.network.whole or y.dtype == x.dtype else y.to(x.dtype)


class Conv(Layer):
    """A convolution with packed weights."""

    summary = "weights packed or transformed once, channels_last"
    of_batch = LIBRARY
    reads = ("stride", "padding", "dilation", "groups", "padding_mode")

    @classmethod
    def unsupported_reason(cls, module: nn.Conv2d) -> str | None:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"padding {module.padding_mode!r}, {module.padding!r}"
        return weights_reason(module)

    @classmethod
    def no_gain_reason(cls, module: nn.Conv2d) -> str | None:
        if module.groups > 1:
            return "left alone: grouped, so that packed weights bring nothing"
        if module.kernel_size == (1, 1) and module.weight.numel() < SMALL_POINTWISE:
            return "left alone: too small to gain"
        return None

    def run(self, input: Tensor) -> Tensor:
        if input.ndim != 4:
            return self.own((input,), {})
        return self.result(self.fused(input), input)

    def fused(self, x: Tensor) -> Tensor:
        """The convolution of x, cast to the network's dtype."""
        if x.dtype != self.network.dtype:
            x = self.taken(x)
        return self.computed((x.shape, x.stride()), self.bind, x)

    def bind(self, x: Tensor, residual: Tensor | None = None, **instead: Any) -> Any:
        """``ops.conv2d`` for tensors like x: call(x, residual, inputs); ``instead`` replaces or adds arguments."""
        m = self.module
        arguments = {
            "bias": m.bias, "stride": m.stride, "padding": m.padding, "dilation": m.dilation, "groups": m.groups,
            "residual": residual, "exact": self.network.exact, "packed": self.store(x),
            "batch_invariant": self.network.takes_batches,
        } | instead  # fmt: skip
        arguments["bias"] = wide(arguments["bias"], x.dtype)
        return bind_conv2d(x, wide(m.weight, x.dtype), **arguments)


class Linear(Layer):
    """A projection; on the CPU with packed weights, by oneDNN."""

    summary = "weights packed once"

    @classmethod
    def no_gain_reason(cls, module: nn.Linear) -> str | None:
        weight = module.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or not packing_pays(weight.device):
            return "left alone: the library's own call was as fast here"
        return "left alone: too small to gain" if weight.numel() < SMALL_LINEAR else None

    def run(self, input: Tensor) -> Tensor:
        if not input.ndim:
            return self.own((input,), {})
        x = input if input.dtype == self.network.dtype else self.taken(input)
        return self.result(self.computed((x.shape, x.stride()), self.bind, x), input)

    def bind(self, x: Tensor) -> Any:
        return bind_linear(x, self.module.weight, self.module.bias, packed=self.store(x))


class GroupNorm(Layer):
    """GroupNorm in one pass over memory, and SiLU after it where the network's own code reads it by a SiLU alone."""

    summary = "one fused pass"
    of_batch = "a group's sums are its own"
    reads = ("num_groups", "eps")
    silu = False  # whether the SiLU at ``known.py``'s TAILS is done here

    def run(self, input: Tensor) -> Tensor:
        # Called by itself, or by a part of the network that was compiled around it, it is a norm and no more.
        silu = self.silu and self.network.local.entered
        y = self.result(self.fused(input, silu), input)
        if silu:
            self.network.local.activated = y
        return y

    def fused(self, x: Tensor, silu: bool) -> Tensor:
        """The norm of x, cast to the network's dtype, and SiLU after it."""
        if x.dtype != self.network.dtype:
            x = self.taken(x)
        bind = self.bind if silu else self.bind_alone
        return self.computed((x.shape, x.stride(), silu), bind, x, None, None)

    def bind_alone(self, x: Tensor, x2: Tensor | None = None, add: Tensor | None = None) -> Any:
        return self.bind(x, x2, add, silu=False)

    def bind(self, x: Tensor, x2: Tensor | None = None, add: Tensor | None = None, silu: bool = True) -> Any:
        """The norm of tensors like x: call(x, x2, add), as ``ops.group_norm_silu`` has them."""
        m = self.module
        weight, bias = wide(m.weight, x.dtype), wide(m.bias, x.dtype)
        backend = "native" if self.network.takes_batches else "auto"
        return bind_group_norm_silu(x, weight, bias, m.num_groups, m.eps, x2=x2, add=add, silu=silu, backend=backend)


class LayerNorm(Layer):
    """LayerNorm in the network's dtype, where its parameters have another one."""

    summary = "in the network's dtype"

    @classmethod
    def no_gain_reason(cls, module: nn.LayerNorm) -> str | None:
        return "left alone: it has the network's dtype"

    reads = ("normalized_shape", "eps")

    def run(self, input: Tensor) -> Tensor:
        m, dtype = self.module, self.network.dtype
        if dtype == (input.dtype if m.weight is None else m.weight.dtype):
            return self.result(F.layer_norm(self.taken(input), m.normalized_shape, m.weight, m.bias, m.eps), input)
        return self.result(self.computed(None, self.bind, input), input)

    def bind(self, x: Tensor) -> Any:
        m, dtype = self.module, self.network.dtype
        weight, bias = (None if p is None else p.detach().to(dtype) for p in (m.weight, m.bias))
        shape, eps = m.normalized_shape, m.eps
        return lambda x: F.layer_norm(self.taken(x), shape, weight, bias, eps)


class AbsorbedSiLU(StandIn):
    """A SiLU whose work the GroupNorm before it has done, where its input is that norm's result."""

    summary = "done by the GroupNorm before it"
    of_batch = ""

    def run(self, input: Tensor) -> Tensor:
        if self.network.local.activated is input:
            return input
        return self.network.by_sample(F.silu, (input,))


class Sequential(StandIn):
    """A Sequential in which SiLU follows GroupNorm: such neighbours are one operation."""

    summary = "its GroupNorm and SiLU are one pass"

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return None if any(fusible(module)) else "it has no GroupNorm before a SiLU"

    def look(self) -> None:
        self.layers, self.fuses = list(self.module), fusible(self.module)
        fused = [layer for layer, fuse in zip(self.layers, self.fuses, strict=True) if fuse]
        self.weights = [p for layer in fused for p in layer.parameters()]  # the other layers look at their own
        self.addresses = list(map(ADDRESS, self.weights))

    def run(self, input: Tensor) -> Tensor:
        x: Any = input
        skip = False
        for layer, fused in zip(self.layers, self.fuses, strict=True):
            if skip:
                skip = False
            elif fused and isinstance(x, Tensor):
                norm = layer.forward
                x, skip = norm.result(norm.fused(x, True), x), True
            else:
                x = layer(x)
        return x


def fusible(sequence: nn.Sequential) -> list[bool]:
    """For each layer, whether it is a GroupNorm that a SiLU follows, of which neither has hooks."""
    layers = list(sequence)
    pairs = [*pairwise(layers), (None, None)]
    return [
        stand_in_of(norm, GroupNorm) is not None
        and type(act) is nn.SiLU
        and "forward" not in act.__dict__
        and replaced_method(act) is None
        and not hooked(norm, act)
        for norm, act in pairs[: len(layers)]
    ]
