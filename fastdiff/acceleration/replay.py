"""Calls of a network that were written down once, and are replayed without its Python, on a CPU.

A call of a small network takes longer in Python, in its library's forwards and our stand-ins' looks, than in kernels.
So where a network was called often with tensors of one layout, one more call is written down as a function of straight
lines: every operation of torch, which a dispatch mode sees, and every call that a stand-in has bound, in whose kernels
a mode sees nothing. That function computes the same bits of other numbers as long as nothing that Python looked at has
changed; and what Python can look at is narrow here. Only networks of which every block is known are replayed, without
hooks or forwards of others' in them; a call whose results depended on Python's reading numbers, or on a generator, is
not written down; every attribute of every module is compared before a replay, beside all that the guard compares; and
the first replay is made beside the ordinary call and compared with it, bit by bit, before it is trusted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from fastdiff.acceleration.module import StandIn, hooked, is_classes_own

if TYPE_CHECKING:
    from fastdiff.acceleration.network import Entry, Network

# Calls of one layout before another is written down: that and the comparison take as much longer as about 12 replays
# save, so a layout that does not come again has cost little.
AFTER = 16
LONGEST = 0.25  # seconds of a call beside which the few milliseconds of Python do not matter
LAYOUTS = 8  # that are kept
READ = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # operations that tell Python numbers


class Recording(TorchDispatchMode):
    """Writes down what is computed while it is active.

    Attributes:
        reason: why that is no function of the given tensors, or None.
    """

    def __init__(self, given: list[Tensor], constants: list[Tensor]) -> None:
        super().__init__()
        self.reason: str | None = None
        self.names = WeakTensorKeyDictionary()  # so that what is not needed any more is freed as in any call
        self.constants = {id(t): t for t in constants}
        self.outside = set(map(_storage, (*given, *constants)))
        self.scope: dict[str, Any] = {}
        self.lines: list[tuple[list[str], str, list[str]]] = []  # the names that a line sets, its call, those it reads
        self.arguments = [f"given{i}" for i in range(len(given))]
        self.within = False  # a bound call, which is one line whatever it computes
        for name, tensor in zip(self.arguments, given, strict=True):
            self.names[tensor] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.within:
            if READ & set(func.tags):
                self.reason = f"{func} tells Python what numbers there are"
            self.write(func, args, kwargs or {}, out, func._schema.is_mutable)
        return out

    def call(self, call: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> Tensor:
        """A bound call of a stand-in."""
        self.within = True
        try:
            out = call(*tensors)
        finally:
            self.within = False
        self.write(call, tensors, {}, out)
        return out

    def write(self, call: Any, args: Any, kwargs: dict[str, Any], out: Any, writes: bool = False) -> None:
        """A line: a call, and names for the tensors that it returned, alone or in a sequence."""
        read: list[str] = []
        words = [self.word(a, read) for a in args] + [f"{k}={self.word(v, read)}" for k, v in kwargs.items()]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if writes and not self.outside.isdisjoint(map(_storage, tensors)):
            self.reason = f"{call} may write to what it was given"
        several = isinstance(out, (tuple, list))
        made = []
        for i, tensor in enumerate(out if several else [out]):
            made.append(f"made{len(self.lines)}_{i}")
            if isinstance(tensor, Tensor):
                self.names[tensor] = made[-1]
            elif tensor is not None:
                self.reason = f"{call} returned a {type(tensor).__name__}"
        left = f"[{', '.join(made)}]" if several else made[0]
        self.lines.append((made, f"{left} = {self.constant(call)}({', '.join(words)})", read))

    def word(self, value: Any, read: list[str]) -> str:
        """An argument as the function has it; the names of its tensors join ``read``."""
        if isinstance(value, Tensor):
            name = self.names.get(value)
            if name is None:
                if id(value) not in self.constants:
                    self.reason = "a tensor came from elsewhere"
                name = self.names[value] = self.constant(value)
            read.append(name)
            return name
        if type(value) in (tuple, list):
            return f"[{', '.join(self.word(v, read) for v in value)}]"
        if isinstance(value, torch.Generator):
            self.reason = "it draws random numbers"
        return repr(value) if value is None or type(value) in (bool, int) else self.constant(value)

    def constant(self, value: Any) -> str:
        name = f"constant{len(self.scope)}"
        self.scope[name] = value
        return name

    def function(self, results: list[Any]) -> Callable[..., list[Any]]:
        """The function that was written down: of the given tensors, with these results. What is read for the last time
        is freed at once, as in the network's own code.
        """
        read: list[str] = []
        words = [self.word(t, read) for t in results]
        used, source = set(read), []
        for made, line, names in reversed(self.lines):
            done = [n for n in dict.fromkeys((*made, *names)) if n.startswith("made") and n not in used]
            used.update(names)
            source.append(f"    {line}{'; del ' + ', '.join(done) if done else ''}\n")
        source.append(f"def replay({', '.join(self.arguments)}):\n")
        exec("".join(reversed(source)) + f"    return [{', '.join(words)}]\n", self.scope)
        return self.scope.pop("replay")  # else the two would keep each other, and weights, until a collection


class Layout:
    """The calls with tensors of one layout.

    Attributes:
        calls, seconds: how many were counted, and the shortest one's time.
        reason: why none is replayed, or None.
        function: what was written down, of the tensors of a call; ``form``: how its results are returned.
        trusted: whether a replay had the bits of the call that it was made beside.
        lock: held by the one thread that counts, writes down or compares; others call the network meanwhile.
    """

    def __init__(self) -> None:
        self.calls, self.seconds = 0, float("inf")
        self.reason: str | None = None
        self.function: Callable[..., list[Any]] | None = None
        self.form: Any = None
        self.trusted = False
        self.lock = threading.Lock()

    def replay(self, tensors: list[Tensor]) -> Any:
        assert self.function is not None
        return tree_unflatten(self.function(*tensors), self.form)

    def compare(self, out: Any, tensors: list[Tensor]) -> None:
        """Trust the function if it gives the bits of ``out``."""
        ours, (right, form) = tree_flatten(self.replay(tensors))[0], tree_flatten(out)
        same = form == self.form and all(map(_same, ours, right))
        self.reason = None if same else "a replay differed from the call"
        self.trusted = same


def _same(ours: Any, right: Any) -> bool:
    if ours is None or right is None:
        return ours is right
    if (ours.dtype, ours.shape, ours.stride()) != (right.dtype, right.shape, right.stride()):
        return False
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (ours, right)))  # zeros' signs and NaN, too


class Replays:
    """The layouts of a network's calls, which ``forget`` drops when anything of the network has changed."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.forget(serves=False)

    def forget(self, serves: bool) -> None:
        """serves: whether the network is of a kind that is replayed."""
        self.serves = serves
        self.layouts: dict[Any, Layout] = {}

    def call(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], unchanged: bool) -> Any:
        """The network's call, entered by ``entry`` after the guard has looked.

        unchanged: no attribute is another than in the calls before. One that others' code sets in every call keeps the
            network from being replayed.
        """
        if not unchanged:
            guard = self.network.guards.get(entry.module)
            if guard is not None:
                guard.remember()
            self.forget(self.serves)
        found = self.find(entry, args, kwargs)
        if found is None:
            return entry(*args, **kwargs)
        layout, tensors = found
        if layout.trusted:
            try:
                return layout.replay(tensors)
            except Exception as error:
                out = entry(*args, **kwargs)  # which says what is wrong where the arguments are, as a label of no class
                layout.trusted, layout.reason = False, f"a replay failed: {error}"
                return out
        if layout.reason is not None or not layout.lock.acquire(blocking=False):
            return entry(*args, **kwargs)
        try:
            if layout.function is not None:
                out = entry(*args, **kwargs)
                layout.compare(out, tensors)
                return out
            if layout.calls >= AFTER:
                return self.record(layout, entry, args, kwargs, tensors)
            layout.calls += 1
            start = time.perf_counter()
            out = entry(*args, **kwargs)
            layout.seconds = min(layout.seconds, time.perf_counter() - start)
            return out
        finally:
            layout.lock.release()

    def find(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Layout, list[Tensor]] | None:
        """The layout of a call and its tensors; None where what it is given is more than tensors and flags."""
        key: list[Any] = [entry]
        tensors: list[Tensor] = []
        if self.network.local.deep is not None or torch._C._len_torch_function_stack():
            return None
        planned = self.network.planned_row() or ()
        for name, value in chain(enumerate(args), kwargs.items(), enumerate(planned, -2)):
            if isinstance(value, Tensor):
                tensors.append(value)
                key.append((name, value.shape, value.stride(), value.dtype))
            elif value is None or value is True or value is False:
                key.append((name, value))
            else:
                return None
        if len(set(map(id, tensors))) < len(tensors):
            return None
        layouts = self.layouts
        layout = layouts.get(tuple(key))
        if layout is None:
            while len(layouts) >= LAYOUTS:
                layouts.pop(next(iter(layouts)), None)
            layout = layouts.setdefault(tuple(key), Layout())
        return layout, tensors

    def record(
        self, layout: Layout, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        """The call, written down."""
        network = self.network
        layout.reason = "its calls take long" if layout.seconds > LONGEST else others_in(entry.module)
        if layout.reason is not None:
            return entry(*args, **kwargs)
        constants = [*network.root.parameters(), *network.root.buffers(), *(network.embeddings.joined or ())]
        recording = network.local.recording = Recording(tensors, constants)
        drawn = torch.get_rng_state()
        try:
            with recording:
                out = entry(*args, **kwargs)
        finally:
            network.local.recording = None
        if not torch.equal(drawn, torch.get_rng_state()):
            recording.reason = "it draws random numbers"
        results, layout.form = tree_flatten(out)
        if not all(t is None or isinstance(t, Tensor) for t in results):
            recording.reason = "it returns more than tensors"
        layout.reason = recording.reason
        if layout.reason is None:
            layout.function = recording.function(results)
            layout.reason = recording.reason
        return out


def others_in(part: nn.Module) -> str | None:
    """Why a part of a network may do more than it computes, or None."""
    for module in part.modules():
        forward = module.__dict__.get("forward")
        own = forward is None or (isinstance(forward, StandIn) and forward.previous is None)
        owner = next(kind for kind in type(module).__mro__ if "forward" in kind.__dict__)
        if hooked(module):
            return "it has hooks"
        if not own or not (owner is nn.Module or is_classes_own(owner, "forward")):
            return f"the forward of a {type(module).__name__} in it is not its class's"
    return None


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
