"""A network as a whole: its dtype, its stand-ins, and the way in and out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration.known import KINDS, UNETS, WHOLE, name_of, replacements
from fastdiff.acceleration.layers import Foreign, cast
from fastdiff.acceleration.module import Context, Fast, fast_of, made_by
from fastdiff.acceleration.time_embedding import Conditioning, Rows, TimeEmbedding, TimeProjection

RECORD = "_fastdiff_accelerated"  # on the object itself: nothing global is touched
# Entered by their parts: encode and decode are no calls of the module.
ENTRIES = {"diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL": (
    "encoder", "decoder", "quant_conv", "post_quant_conv",
)}  # fmt: skip


class Root(Fast):
    """The way into a network: gradients off where none are asked for; what comes out has its input's dtype."""

    does = "results in the input's dtype"

    def __init__(self, module: nn.Module, context: Context, inner: Fast | None) -> None:
        super().__init__(module, context)
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self.module.training:
            return self.original(*args, **kwargs)
        if torch.is_grad_enabled():
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if any(t.requires_grad for t in (*tensors, *self.module.parameters())):
                return self.original(*args, **kwargs)
        with torch.no_grad():
            return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        # Each call's own: a captured graph's must not be another one's.
        self.conditioning.local.pop("counters", None)
        out = self.original(*args, **kwargs) if self.inner is None else self.inner.run(*args, **kwargs)
        wanted = next((a.dtype for a in (*args, *kwargs.values()) if _floating(a)), self.dtype)
        if not isinstance(out, Tensor) and _floating(getattr(out, "sample", None)):
            out.sample = out.sample.to(wanted)
            return out
        return cast(out, wanted)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass
class Network:
    """What was put where in one network."""

    root: nn.Module
    context: Context
    made: dict[nn.Module, Fast]
    kept: list[tuple[nn.Module, str]]
    number: int = field(default_factory=itertools.count().__next__)  # no other network's, in this process

    def rows(self, times: Tensor) -> Rows | None:
        """The rows of a plan's timesteps [rows], where the network takes its time by an embedding that is known."""
        model: Any = self.root
        if name_of(model) not in UNETS or not self.context.conditioning.blocks:
            return None
        if fast_of(model.time_proj, TimeProjection) is None or fast_of(model.time_embedding, TimeEmbedding) is None:
            return None
        return Rows(model, self.context.conditioning, times)

    def stamp(self) -> int:
        """A number that differs after a weight was written to, which copies of weights do not see."""
        return hash(tuple(p._version for p in self.root.parameters() if not p.is_inference()))

    def kept_weights(self) -> list[Any]:
        """All that its stand-ins have made of weights, with those weights."""
        return [made for fast in self.made.values() for made in made_by(fast)]

    def counts(self) -> list[tuple[str, int, str]]:
        """(class, how many, what was done); not the layers inside a block that was replaced as a whole."""
        inside = {part for m, fast in self.made.items() if isinstance(fast, WHOLE) for part in list(m.modules())[1:]}
        found = Counter((type(m).__name__, fast.does) for m, fast in self.made.items() if m not in inside)
        return [(kind, count, does) for (kind, does), count in found.items()]

    def reasons(self) -> list[tuple[str, int, str]]:
        found = Counter((type(m).__name__, why) for m, why in self.kept)
        return [(kind, count, why) for (kind, why), count in found.items()]


def put(module: nn.Module, dtype: torch.dtype, kinds: Collection[type[Fast]] = KINDS, exact: bool = False) -> Network:
    """Replace what is known in a network, or only by stand-ins of ``kinds``; raises ValueError where nothing is.

    ``exact`` convolutions are computed as they stand.
    """
    context = Context(dtype, Conditioning(), exact)
    made, kept = replacements(module, context, kinds)
    if all(isinstance(fast, Foreign) for fast in made.values()):
        for m in made:
            del m.__dict__["forward"]
        raise ValueError(f"nothing in this {type(module).__name__} is known to fastdiff, so nothing was changed")
    entries = [getattr(module, name) for name in ENTRIES.get(name_of(module), ())] or [module]
    for entry in entries:
        if entry is not None:
            entry.__dict__["forward"] = made[entry] = Root(entry, context, made.get(entry))
    network = module.__dict__[RECORD] = Network(module, context, made, kept)
    return network


def check(network: Network) -> None:
    """Raise ValueError where a stand-in was replaced by something else."""
    for module, fast in network.made.items():
        if module.__dict__.get("forward") is not fast:
            raise ValueError(
                f"the forward of a {type(module).__name__} was replaced since accelerate; put it back first"
            )


def take(network: Network) -> None:
    """Give every module its own forward back."""
    for module in network.made:
        del module.__dict__["forward"]
    del network.root.__dict__[RECORD]


def of(module: Any) -> Network | None:
    """What was put into a module itself, or None; a compiled module runs what it traced."""
    found = module.__dict__.get(RECORD) if isinstance(module, nn.Module) else None
    return found if isinstance(found, Network) else None


def all_of(module: Any) -> list[Network]:
    """What was put into a module and those inside it."""
    return [found for m in module.modules() if (found := of(m)) is not None]


def native_dtype(module: nn.Module) -> torch.dtype:
    """What "auto" takes: the network's own dtype if that is a half one, else bfloat16 where the device has it."""
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    if first is None or first.dtype in (torch.bfloat16, torch.float16):
        return torch.float32 if first is None else first.dtype
    native = False
    if first.device.type == "cuda":
        native = torch.cuda.get_device_capability(first.device) >= (8, 0)
    elif first.device.type == "cpu" and torch.backends.mkldnn.is_available():
        has = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        native = any(f is not None and f() for f in has)
    return torch.bfloat16 if native else torch.float32
