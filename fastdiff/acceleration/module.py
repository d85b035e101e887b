"""What stands in for a module's forward, and how it falls back to the module's own code."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastdiff.acceleration.network import Network

LAYOUTS = 16  # bound calls that a stand-in keeps: more sizes than a server, or a tiled decoder, alternates between
REPLICATE = "_replicate_for_data_parallel"
ADDRESS = Tensor.data_ptr


class StandIn(ABC):
    """Stands in for ``module.forward``, as an attribute of the one instance; ``run`` computes the same function.

    A stand-in is only made for a module of which it knows everything that matters: its class, its layers, its options
    and its weights. The network's guard compares all of that before each call of the network; where something
    differs, ``reason`` says what, and the module's own code runs. Weights that are moved while the network runs, as
    offloading does, are seen by their addresses in ``__call__``.

    Attributes:
        summary: what it does, for the report.
        reads: the module's attributes that ``run`` or a bound call relies on.
        unread: keyword arguments that the module's own code takes and makes no use of.
        of_batch: how ``run`` keeps a sample's bits from depending on the batch, in a batch-invariant network, for the
            report; None where it does not, so that it is called sample by sample.
        reason: why the module's own code runs instead, or None.
        bound: the calls that were bound, by the layout of their tensors; replaced as a whole when weights change.
        packed: weights in another form, shared by the bound calls; likewise.
    """

    summary: ClassVar[str]
    summary_alone: ClassVar[str | None] = None  # where another is true of one sample at a time
    reads: ClassVar[tuple[str, ...]] = ()
    unread: ClassVar[tuple[str, ...]] = ()
    of_batch: ClassVar[str | None] = None
    reason: str | None

    def __init__(self, module: Any, network: Network) -> None:
        self.module, self.network = module, network
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")
        self.own_forward = type(module).forward
        self.weights: list[Tensor] = []
        self.addresses: list[int] = []
        self.reason = None
        self.forget()

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        """Why this module is not one that ``run`` computes, or None."""
        return None

    @classmethod
    def no_gain_reason(cls, module: Any) -> str | None:
        """Why a stand-in for this module, amid code that is not known, would not be faster than its own code, or None.

        The stand-in of a layer costs some microseconds of Python a call, which it must bring in.
        """
        return None

    @abstractmethod
    def run(self, *args: Any) -> Any:
        """What the module's forward computes, of the same positional arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self.outside(args, kwargs)
        if not self.network.local.inside:
            return self.network.enter(self, args, kwargs)
        if self.reason is not None:
            return self.network.by_sample(self.original, args, kwargs)
        if list(map(ADDRESS, self.weights)) != self.addresses:
            return self.own(args, kwargs)
        if kwargs:
            arranged = arrange(type(self.module), args, kwargs, self.unread)
            if arranged is None:
                return self.own(args, kwargs)
            args = arranged
        if self.of_batch is None or self.network.apart is not None:
            return self.network.by_sample(self.run, args)
        return self.run(*args)

    def outside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``original`` in a call that stand-ins do not serve; in a batch-invariant network sample by sample."""
        if not self.network.invariant:
            return self.original(*args, **kwargs)
        return self.network.outside(self, args, kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What ``inspect.signature`` and torch.export look at in the place of ``__call__``."""
        return self.previous or MethodType(type(self.module).forward, self.module)

    @property
    def __code__(self) -> CodeType:
        """Where the forward was written, for torch.export's messages."""
        return self.__wrapped__.__code__

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, or the one that it had as an attribute before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        if torch.compiler.is_compiling():  # which cannot look at the class of every module
            return self.own_forward(self.module, *args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``original`` amid tensors of the network's dtype, which its parameters may not have; in a network that is not
        known as a whole, the tensors around have the dtype that the module's own code expects.
        """
        by_sample = self.network.by_sample
        if not self.network.whole:
            return by_sample(self.original, args, kwargs)
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), self.network.dtype)
        if dtype == self.network.dtype:
            return by_sample(self.original, args, kwargs)
        return cast(by_sample(self.original, cast(args, dtype), cast(kwargs, dtype)), self.network.dtype)

    def taken(self, x: Tensor) -> Tensor:
        """A tensor of another dtype in the network's."""
        if not x.is_floating_point():
            raise TypeError(f"{type(self.module).__name__} takes floating point; got {x.dtype}")
        return x.to(self.network.dtype)

    def look(self) -> None:
        """Take the addresses of the weights below this module as those that bound calls may rely on."""
        self.weights = list(self.module.parameters())
        self.addresses = list(map(ADDRESS, self.weights))

    def forget(self) -> None:
        """Drop what was derived from weights. Calls under way keep what they hold."""
        # In this order: a thread that finds the new ``bound`` packs into the new ``packed``.
        self.packed: dict[Any, Any] = {}
        self.bound: dict[Any, Callable[..., Any]] = {}

    def computed(self, key: Any, bind: Callable[..., Any], *tensors: Tensor | None) -> Tensor:
        """The result of the call that was bound for tensors of this layout, which ``key`` tells.

        bind: makes the call from such tensors, the first time; or the call and its result, where it needs that.
        """
        bound, recording = self.bound, self.network.local.recording
        call = bound.get(key)
        if call is None:
            if recording is not None:
                recording.reason = "a call was bound, whose kernels are not seen"
            made = bind(*tensors)
            call, y = made if type(made) is tuple else (made, None)
            self.keep(bound, key, call, tensors[0].device)  # type: ignore[union-attr]
            if y is not None:
                return y
        return call(*tensors) if recording is None else recording.call(call, tensors)

    def keep(
        self, bound: dict[Any, Callable[..., Any]], key: Any, call: Callable[..., Any], device: torch.device
    ) -> None:
        """Keep a bound call for the next tensors of this layout, in the ``bound`` that was there before it was made:
        where another thread has seen weights change meanwhile, the call goes with it.
        """
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return  # a capture computes nothing: weights that were packed in it are its graph's alone
            torch.cuda.current_stream(device).synchronize()  # another thread may read the weights on its own stream
        while len(bound) >= LAYOUTS:
            bound.pop(next(iter(bound)), None)
        bound[key] = call

    def store(self, x: Tensor) -> dict[Any, Any]:
        """Where a bound call finds, and leaves, the weights that it packs."""
        return {} if x.is_cuda and torch.cuda.is_current_stream_capturing() else self.packed

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"bound": {}, "packed": {}, "weights": [], "addresses": []}


class Single(StandIn):
    """A module of which nothing is known, in a network that its other modules serve batch by batch."""

    summary = "its own code"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self.outside(args, kwargs)
        if not self.network.local.inside:
            return self.network.enter(self, args, kwargs)
        return self.network.by_sample(self.original, args, kwargs)

    def run(self, *args: Any) -> Any:
        return self.original(*args)

    def look(self) -> None:
        """Nothing is bound to its weights."""


@lru_cache(maxsize=256)
def _parameters(kind: type) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of a class's forward's parameters in order, without self, and the defaults of those that have one."""
    parameters = [
        p
        for p in list(inspect.signature(kind.forward).parameters.values())[1:]  # type: ignore[attr-defined]
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return tuple(p.name for p in parameters), {p.name: p.default for p in parameters if p.default is not p.empty}


def arrange(
    kind: type, args: tuple[Any, ...], kwargs: dict[str, Any], unread: tuple[str, ...] = ()
) -> tuple[Any, ...] | None:
    """The arguments of a call by their positions in the forward of a class, but for those that are not read; None where
    they are not all known there.
    """
    names, defaults = _parameters(kind)
    out, left = list(args), dict(kwargs)
    for name in names[len(args) :]:
        if not left:
            break
        if name in left:
            out.append(left.pop(name))
        elif name in defaults:
            out.append(defaults[name])
        else:
            return None
    return None if any(left[name] is not None for name in left if name not in unread) else tuple(out)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A structure of tensors with those of floating point cast; ``value`` itself where there is nothing to cast."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(v, dtype) for v in value))
    if type(value) in (tuple, list):
        return type(value)(cast(v, dtype) for v in value)
    if isinstance(value, dict):  # also the outputs of diffusers and transformers, whose entries are attributes, too
        for key, entry in list(value.items()) if type(value) is not dict else ():
            new = cast(entry, dtype)
            if new is not entry:
                value[key] = new
        return {k: cast(v, dtype) for k, v in value.items()} if type(value) is dict else value
    return value


def stand_in_of(module: Any, kind: Any) -> Any:
    """The ``kind`` that stands in for a module and is in use, or None."""
    found: Any = module.__dict__.get("forward") if isinstance(module, nn.Module) else None
    if found is not None and not isinstance(found, kind):
        found = getattr(found, "inner", None)  # of the way into a network that is one block
    return found if isinstance(found, kind) and found.reason is None else None


def hooked(*modules: Any) -> bool:
    """Whether a module has hooks, which would not run where its forward is not called."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for module in modules for name in names)


def unusual(*modules: Any) -> str | None:
    """Why a block cannot read the layers in it instead of calling them, or None."""
    for module in modules:
        name = type(module).__name__
        if hooked(module):
            return "a layer in it has hooks"
        forward = module.__dict__.get("forward")
        if forward is not None and not isinstance(forward, StandIn):
            return f"the forward of a {name} in it is not its class's"
        if getattr(forward, "previous", None) is not None:
            return f"the forward of a {name} in it is not its class's"
        reason = replaced_method(module) or weights_reason(module)
        if reason is not None:
            return f"of a {name} in it {reason}"
    return None


def own_replica(module: nn.Module, invariant: bool = False) -> nn.Module:
    """What ``nn.DataParallel`` makes of a module for another device, with the module's own code: a stand-in is bound to
    the weights of the one module.
    """
    if invariant:
        raise RuntimeError("a batch_invariant network has no replicas: nn.DataParallel runs its own code on a batch")
    replica = type(module)._replicate_for_data_parallel(module)
    for name in ("forward", REPLICATE):
        replica.__dict__.pop(name, None)
    return replica


def replaced_method(module: Any) -> str | None:
    """Why a module's class does not tell what it computes, or None: a method, such as Conv2d's ``_conv_forward``, is
    hidden by an attribute of the instance, or the class was given another forward.
    """
    kind = type(module)
    for name, value in module.__dict__.items():
        if name not in ("forward", REPLICATE) and callable(value) and callable(getattr(kind, name, None)):
            return f"the {name} is not its class's"
    for name in ("forward", "_conv_forward"):
        if hasattr(kind, name) and not is_classes_own(kind, name):
            return f"the {name} of its class was replaced"
    return None


def is_classes_own(kind: type, name: str) -> bool:
    """Whether a method is what stands in the class's body, perhaps in a decorator of torch's or of the class's own
    package, which keeps its names.
    """
    method = getattr(kind, name)
    whose = getattr(method, "__globals__", {}).get("__name__", method.__module__).split(".")[0]
    names = method.__module__, method.__qualname__
    own = whose in ("torch", kind.__module__.split(".")[0])
    return own and names == (kind.__module__, f"{kind.__qualname__}.{name}")


def weights_reason(module: Any) -> str | None:
    """Why the weights of a layer are not plain parameters with numbers of their own, or None."""
    for name in ("weight", "bias"):
        value = getattr(module, name, None)
        if value is None:
            continue
        if name not in module._parameters:
            return f"the {name} is no parameter"  # an old weight_norm, pruning
        if type(value) not in (nn.Parameter, Tensor):
            return f"the {name} is a {type(value).__name__}"  # torchao
        if value.is_meta or value.layout != torch.strided or not value.is_floating_point():
            return f"the {name} is {value.dtype} on {value.device}"
    return None


def wide(parameter: Any, dtype: torch.dtype) -> Any:
    """A parameter, or None, as the operations take it: of ``dtype`` or float32, itself where it is."""
    if parameter is None or parameter.dtype in (dtype, torch.float32):
        return parameter
    return parameter.detach().to(torch.float32)
