"""Deep features of a UNet: kept by one call, taken by later ones, which then compute the shallow layers alone.

DeepCache (Ma, Fang & Wang 2024, arXiv:2312.00858, Section 3.2): what enters an up block beside a skip connection, the
main branch, changes little from step to step. A shallow call computes the way down only as far as skip connection
``branch`` (0 is the first, conv_in's result), takes the kept features of the main branch there, and goes on with the
way up. All that lies deeper is left out. It runs the network's own forward, of whose blocks those that are left out
return placeholders; an up block begins where the features enter (``blocks.Up``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration.blocks import Up, freeu
from fastdiff.acceleration.known import UNETS, name_of
from fastdiff.acceleration.module import StandIn, hooked, stand_in_of
from fastdiff.acceleration.network import Network


class Deep:
    """What the blocks of one call ask: which of their layers run, and what enters them.

    Attributes:
        counts: of each down and up block, how many of its layers are shallow: a down block's first (its down-sampling
            is one of them), an up block's last.
        border: the up block whose first shallow layer the features enter, and the number of that layer.
        given: the features of an earlier call; None in a call that keeps its own, as ``kept``.
        entered: how often the border was passed: once, if the call went as it should.
    """

    def __init__(self, counts: dict[nn.Module, int], border: tuple[nn.Module, int], given: Tensor | None) -> None:
        self.counts, self.border, self.given = counts, border, given
        self.kept: Tensor | None = None
        self.entered = 0

    def leaves_out(self, block: nn.Module) -> bool:
        return self.given is not None and self.counts[block] == 0

    def before(self, block: nn.Module, layer: int, x: Tensor | None) -> Tensor | None:
        """What enters an up block's layer: x, or at the border the given features; None where the layer is left out."""
        if (block, layer) != self.border:
            return None if self.given is not None and block is self.border[0] and not self.entered else x
        self.entered += 1
        if self.given is None:
            self.kept = x
            return x
        return self.given


class Shortened(StandIn):
    """A down block, of which a shallow call computes the first layers alone, or none."""

    summary = "cut short where deep features are given"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        deep = self.network.local.deep if self.network.local.inside else None
        if deep is None or deep.given is None or deep.counts[self.module] == _layers(self.module):
            return self.original(*args, **kwargs)
        if kwargs.get("additional_residuals") is not None:
            raise ValueError("additional residuals of a T2I adapter do not go with deep features that are reused")
        x, skips = (args[0] if args else kwargs["hidden_states"]), ()
        count = deep.counts[self.module]
        if count:
            x, skips = type(self.module).forward(_First(self.module, count), *args, **kwargs)
        # Without a dimension, it can be added to any residual that a ControlNet has for a skip connection.
        placeholder = x.new_zeros(())
        return x, (*skips, *[placeholder] * (_layers(self.module) - count))

    def run(self, *args: Any) -> Any:
        return self.original(*args)


class LeftOut(StandIn):
    """The middle block, which a shallow call leaves out."""

    summary = "left out where deep features are given"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        deep = self.network.local.deep if self.network.local.inside else None
        if deep is None or deep.given is None:
            return self.original(*args, **kwargs)
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        return x.new_zeros(())

    def run(self, *args: Any) -> Any:
        return self.original(*args)


class _First:
    """A down block as its class's forward sees it, with its first layers alone and without the down-sampling."""

    def __init__(self, block: Any, count: int) -> None:
        self._block = block
        self.resnets = list(block.resnets)[:count]
        self.attentions = list(getattr(block, "attentions", None) or ())[:count]
        self.downsamplers = () if name_of(block).startswith("fastdiff.") else None  # diffusers counts an empty list

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def _layers(block: Any) -> int:
    """How many skip connections a down block leaves."""
    return len(block.resnets) + bool(block.downsamplers)


class DeepCalls:
    """Calls of an accelerated network that keep their deep features or take an earlier call's: ``sampling.reuse`` has
    the protocol. ``model`` is the network, or a module around it, which calls it once.

    Raises ValueError where the network's blocks are not all known, for a branch that it does not have, and under
    batch_invariant.
    """

    def __init__(self, model: Any, network: Network, branch: int) -> None:
        self.model, self.network = model, network
        root: Any = network.root
        what = type(root).__name__
        if name_of(root) not in UNETS:
            raise ValueError(f"a {what} has no deep features to reuse; UNets of fastdiff.models and of diffusers have")
        if network.invariant:  # which may call the network for one sample after the other
            raise ValueError(f"this {what} was accelerated with batch_invariant=True, which reuses no deep features")
        self.downs, self.middle, self.ups = list(root.down_blocks), root.mid_block, list(root.up_blocks)
        last = sum(len(block.resnets) for block in self.ups) - 1
        if branch > last:
            raise ValueError(f"branch is {branch}, but this {what} has the skip branches 0 … {last}")
        kinds: dict[nn.Module, type[StandIn]] = {block: Shortened for block in self.downs}
        kinds |= {} if self.middle is None else {self.middle: LeftOut}
        network.add({block: kind for block, kind in kinds.items() if name_of(block) in _BLOCKS})
        if (reason := self.unsupported_reason()) is not None:
            raise ValueError(f"this {what} cannot reuse deep features: {reason}")
        self.counts = dict[nn.Module, int]()
        left = branch
        for block in self.downs:
            self.counts[block] = min(left, _layers(block))
            left -= self.counts[block]
        left = branch + 1
        for block in reversed(self.ups):
            self.counts[block] = min(left, len(block.resnets))
            left -= self.counts[block]
            if self.counts[block]:
                self.border = block, len(block.resnets) - self.counts[block]

    def unsupported_reason(self) -> str | None:
        """Why a call could not leave layers out as the network is now, or None."""
        blocks: list[tuple[Any, type[StandIn]]] = [(block, Shortened) for block in self.downs]
        blocks += [] if self.middle is None else [(self.middle, LeftOut)]
        for block, kind in [*blocks, *((block, Up) for block in self.ups)]:
            stand_in = block.__dict__.get("forward")
            if stand_in_of(block, kind) is None or stand_in.previous is not None:
                why = getattr(stand_in, "reason", None) or "its forward is not its class's, or its class is not known"
                return f"of a {type(block).__name__} in it, {why}"
            if hooked(block):
                return f"a {type(block).__name__} in it has hooks"
            if freeu(block):
                return f"FreeU is at work in a {type(block).__name__}"
        return None

    def __call__(self, x: Tensor, t: Tensor, deep: Tensor | None, **kwargs: Any) -> tuple[Any, Tensor]:
        local = self.network.local
        if (reason := self.unsupported_reason()) is not None:
            raise RuntimeError(f"deep features cannot be reused any more: {reason}")
        local.deep = run = Deep(self.counts, self.border, deep)
        try:
            out = self.model(x, t, **kwargs)
        finally:
            local.deep = None
        features = run.kept if deep is None else deep
        if run.entered != 1 or features is None:
            raise RuntimeError(
                f"deep features were {'kept' if deep is None else 'read'} {run.entered} times in one call: the "
                "network's own code ran (autocast, gradients, a hook of all modules), or it was called again"
            )
        return out, features


_BLOCKS = (
    "fastdiff.models.unet.DownBlock",
    "fastdiff.models.unet.MidBlock",
    "diffusers.models.unets.unet_2d_blocks.DownBlock2D",
    "diffusers.models.unets.unet_2d_blocks.AttnDownBlock2D",
    "diffusers.models.unets.unet_2d_blocks.CrossAttnDownBlock2D",
    "diffusers.models.unets.unet_2d_blocks.UNetMidBlock2D",
    "diffusers.models.unets.unet_2d_blocks.UNetMidBlock2DCrossAttn",
)
