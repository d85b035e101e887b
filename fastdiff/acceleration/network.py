"""A network as a whole: its dtype, its stand-ins, the way in, and the guard at it."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastdiff.acceleration.blocks import Block, Resnet
from fastdiff.acceleration.guard import Guard
from fastdiff.acceleration.invariance import (
    batch_of,
    each,
    reason_apart,
    reason_for_kernels,
    refusal,
    unknown_in,
)
from fastdiff.acceleration.known import (
    AUTOENCODERS,
    EMBEDDINGS,
    KNOWN,
    LAYERS,
    TAILS,
    TIMES,
    UNETS,
    WHOLE,
    inside_out,
    is_whole,
    kept_as,
    name_of,
    plans_embeddings,
    reason_of,
)
from fastdiff.acceleration.layers import AbsorbedSiLU, GroupNorm, Layer
from fastdiff.acceleration.module import (
    REPLICATE,
    Single,
    StandIn,
    cast,
    hooked,
    own_replica,
    replaced_method,
    stand_in_of,
)
from fastdiff.acceleration.replay import Replays
from fastdiff.acceleration.report import Accelerated, NetworkReport, Rows
from fastdiff.acceleration.time_embedding import PlannedEmbeddings, TimeEmbedding, TimeEmbeddings, TimeProjection
from fastdiff.checks import DTYPES

RECORD = "_fastdiff_accelerated"  # on the object itself: nothing global is touched
PROMPTS = 4  # that are remembered, with their keys and values
INSTALLING = threading.RLock()  # one thread at a time puts stand-ins into networks


class Local(threading.local):
    """What one thread knows of its call of a network; class attributes are what it starts from."""

    inside = False  # a call of the network goes on: its guard has looked
    temb: Any = None  # the embedding whose rows the blocks ask for, and its version
    version: Any = None
    rows: Any = None
    planned: Any = None  # the row of PlannedEmbeddings that the sampler has reached, and the epoch that it belongs to
    deep: Any = None  # what the blocks of a call that keeps or takes deep features ask (acceleration.deep)
    entered = False  # by the network's own forward, or a part's that is called by itself, such as a decoder
    activated: Any = None  # the result of a GroupNorm that did the work of the SiLU after it
    prompt: Any = (None, None)  # the prompt of this call and its number
    recording: Any = None  # what writes this call down (acceleration.replay)
    batch = 0  # samples of this call of a batch-invariant network
    alone = False  # one of them is computed by itself

    def clear(self) -> None:
        self.inside = self.entered = False
        self.temb = self.version = self.rows = self.activated = None
        self.prompt = (None, None)


class Entry(StandIn):
    """The way into a network, or into a part that is called by itself: what comes out has its input's dtype."""

    summary = "results in the input's dtype"

    def __init__(self, module: nn.Module, network: Network, inner: StandIn | None) -> None:
        super().__init__(module, network)
        self.inner = inner
        if inner is not None:
            self.previous = inner.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network = self.network
        if torch.compiler.is_compiling():
            return self.outside(args, kwargs)
        if network.local.inside:
            return self._inside(args, kwargs)
        if torch.is_grad_enabled():  # what asks for a gradient may be hidden in a hook, a list or a closure
            network.stale = True
            return self.outside(args, kwargs)
        return network.enter(self, args, kwargs)

    def _inside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.original if self.inner is None else self.inner
        whole = self.network.apart is None
        out = call(*args, **kwargs) if whole else self.network.by_sample(call, args, kwargs, given=True)
        return self.network.as_given(out, args, kwargs)

    def look(self) -> None:
        """Nothing is bound to weights here; the stand-ins inside look at their own."""

    def run(self, *args: Any) -> Any:
        return self._inside(args, {})


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class Network:
    """What was put where in one network, what that assumed, and what happens where it no longer holds.

    Attributes:
        root: the network.
        requested: the dtype that was asked for, or "auto".
        dtype: that of its arithmetic now; ``own_dtype``: its parameters'.
        whole: whether every block is known and computed in ``dtype``, so that tensors between blocks have it. Else a
            layer's result has its input's dtype, whatever it computes in.
        stand_ins: by module, the inner before the outer.
        stale: whether the network recorded gradients or was trained since the weights were looked at.
        invariant: whether a sample's bits are promised to be the same in every batch (invariance.py).
        apart: why an invariant network is called sample by sample as a whole; None where parts of it alone are.
        refused: why that promise cannot be kept of the network as it is now, or None.
    """

    def __init__(
        self, root: nn.Module, requested: torch.dtype | str, exact: bool, kinds: dict[str, Any], invariant: bool
    ) -> None:
        self.root, self.requested, self.exact, self.kinds = root, requested, exact, kinds
        self.invariant = invariant
        self.apart: str | None = None
        self.refused: str | None = None
        self.number = next(_numbers)  # no other network's, in this process
        self.epoch = 0  # a graph's key: another one means other weights or other stand-ins
        self.local, self.lock = Local(), threading.RLock()
        self.stand_ins: dict[nn.Module, StandIn] = {}
        self.left: dict[nn.Module, str] = {}  # whose class is known, but whose own code is as fast
        self.entries: list[Entry] = []
        self.embeddings, self.replays = TimeEmbeddings(self), Replays(self)
        self.guards: dict[nn.Module, Guard] = {}
        self.known_prompts: dict[int, Tensor] = {}
        self.stale = self.whole = self.removed = False
        self.accelerated: Accelerated | None = None  # what accelerate returned
        self.first_dtype = self.own_dtype = self.dtype = _own_dtype(root)
        self._install()

    def __getstate__(self) -> dict[str, Any]:
        dropped: dict[str, Any] = {
            "local": None,
            "lock": None,
            "guards": {},
            "known_prompts": {},
            "replays": None,
            "number": None,
            "stale": True,
        }
        return self.__dict__ | dropped

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.local, self.lock, self.number = Local(), threading.RLock(), next(_numbers)
        self.replays = Replays(self)

    # ---- in and out

    def _install(self) -> None:
        needed = self._needed()
        for module in inside_out(self.root):
            kind = self.kinds.get(name_of(module))
            if kind is None or reason_of(module, kind) is not None:
                continue
            reason = None if module in needed else kind.no_gain_reason(module)
            if reason is None:
                self._put(module, kind(module, self))
            else:
                self.left[module] = reason
        if plans_embeddings(self.root):
            for part in (self.root.get_submodule("time_proj"), self.root.get_submodule("time_embedding")):
                if name_of(part) in TIMES and "forward" not in part.__dict__:
                    self._put(part, TIMES[name_of(part)](part, self))
        self._absorb()
        if self.invariant:
            for part in [m for entry in _entries(self.root) for m in unknown_in(entry, self.stand_ins)]:
                if part not in _entries(self.root) and "forward" not in part.__dict__:
                    self._put(part, Single(part, self))
        elif not self.stand_ins:
            what = f"nothing in this {type(self.root).__name__} is known to fastdiff"
            raise ValueError(f"{what}{' and would be faster' if self.left else ''}, so nothing was changed")
        for part in _entries(self.root):
            entry = Entry(part, self, self.stand_ins.pop(part, None))
            self.entries.append(entry)
            self._put(part, entry)
        self.root.__dict__[RECORD] = self
        self.renew()
        if self.refused is not None:
            self.remove()
            raise ValueError(f"batch_invariant cannot be promised of this {type(self.root).__name__}: {self.refused}")

    def _needed(self) -> set[nn.Module]:
        """The modules that get a stand-in whether or not that alone is faster: all, where the whole network is known
        or another dtype was asked for, and else the layers that a block reads.
        """
        if name_of(self.root) in (*UNETS, *AUTOENCODERS) or self.requested not in ("auto", self.own_dtype):
            return set(self.root.modules())
        blocks = (m for m in self.root.modules() if issubclass(KNOWN.get(name_of(m), Layer), Block))
        return {part for block in blocks for part in block.modules()}

    def _put(self, module: nn.Module, stand_in: StandIn) -> None:
        module.__dict__["forward"] = self.stand_ins[module] = stand_in
        module.__dict__.setdefault(REPLICATE, partial(own_replica, module, self.invariant))

    def add(self, kinds: dict[nn.Module, type[StandIn]]) -> None:
        """Put further stand-ins in, where modules have none and are as their class has them."""
        with INSTALLING:
            new = {m: kind for m, kind in kinds.items() if m not in self.stand_ins and reason_of(m, kind) is None}
            for module, kind in new.items():
                self._put(module, kind(module, self))
            if new:
                self.renew()

    def _absorb(self) -> None:
        """The SiLU at the end of networks whose own forward reads their last GroupNorm by it alone."""
        owners = Counter(child for m in self.root.modules() for child in m.children())
        for tail in self.root.modules():
            if name_of(tail) not in TAILS or "forward" in tail.__dict__:
                continue
            norm, act = tail.get_submodule("conv_norm_out"), tail.get_submodule("conv_act")
            if stand_in_of(norm, GroupNorm) is None or type(act) is not nn.SiLU or "forward" in act.__dict__:
                continue
            if owners[norm] == owners[act] == 1 and not hooked(norm, act):
                self._put(act, AbsorbedSiLU(act, self))

    def remove(self) -> None:
        """Give every module the forward that it had, but where another one was put around ours since: that stays, and
        ours passes on what it is called with.
        """
        for module, stand_in in self.stand_ins.items():
            if module.__dict__.get("forward") is stand_in:
                del module.__dict__["forward"]
                if stand_in.previous is not None:
                    module.__dict__["forward"] = stand_in.previous
            if getattr(module.__dict__.get(REPLICATE), "func", None) is own_replica:
                del module.__dict__[REPLICATE]
            stand_in.forget()
        self.removed = True
        self.replays.forget(serves=False)
        for stand_in in (*self.stand_ins.values(), *(e.inner for e in self.entries if e.inner is not None)):
            stand_in.reason = "it was restored"
        self.root.__dict__.pop(RECORD, None)

    # ---- the guard

    def enter(self, stand_in: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outermost call of a stand-in: compare what was assumed, then run."""
        if self.removed or self.unsuitable(args, kwargs):
            return stand_in.outside(args, kwargs)
        if self.root.training:
            self.stale = True
            return stand_in.outside(args, kwargs)
        unchanged = self.check(stand_in.module)
        local = self.local
        if self.invariant:
            self._promise()
            local.batch = batch_of(stand_in, args, kwargs)
        local.inside, local.entered = True, isinstance(stand_in, Entry)
        try:
            if self.replays.serves and isinstance(stand_in, Entry):
                return self.replays.call(stand_in, args, kwargs, unchanged)
            return self.as_given(stand_in(*args, **kwargs), args, kwargs)
        finally:
            local.clear()

    # ---- of a batch-invariant network

    @property
    def takes_batches(self) -> bool:
        """Whether it is a batch-invariant network of which parts are given a whole batch."""
        return self.invariant and self.apart is None

    def by_sample(
        self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, given: bool = False
    ) -> Any:
        """``call(*args, **kwargs)``; in a batch-invariant network of each sample alone, unless one is already.

        given: these are the network's own arguments, whose tensors must have an entry a sample, or one for all.
        """
        local, kwargs = self.local, kwargs or {}
        if not self.invariant or local.alone or not local.batch:
            return call(*args, **kwargs)
        local.alone = True
        try:
            return each(call, args, kwargs, local.batch, type(self.root).__name__, not given)
        finally:
            local.alone = False

    def outside(self, stand_in: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module's own code sample by sample, where stand-ins do not serve: gradients are recorded, say."""
        if self.removed or self.local.alone:
            return stand_in.original(*args, **kwargs)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed():
            raise RuntimeError(
                "a batch_invariant network is not compiled, traced or transformed, which would compute a whole batch "
                "at once; fastdiff.restore it first"
            )
        self._promise()
        self.local.batch = batch_of(stand_in, args, kwargs)
        return self.by_sample(stand_in.original, args, kwargs, given=True)

    def _promise(self) -> None:
        """RuntimeError where a sample's bits would depend on the batch, or on what was measured."""
        why = self.refused
        if self.root.training:
            why = "it is in training mode; call eval()"
        elif torch.backends.cudnn.benchmark and _device(self.root).type == "cuda":
            why = "torch.backends.cudnn.benchmark chooses its convolutions by what was fastest once"
        if why is not None:
            raise RuntimeError(f"batch_invariant cannot be promised of this {type(self.root).__name__}: {why}")

    def _settle(self) -> None:
        """Look which parts may be given a whole batch."""
        entries = _entries(self.root)
        reasons = [reason_for_kernels(_device(self.root)), *(reason_apart(part, self.stand_ins) for part in entries)]
        self.apart = next(filter(None, reasons), None)
        self.refused = refusal(self.root, entries)

    def as_given(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A result for the world outside: in the dtype of what went in, where all inside has the network's."""
        if not self.whole:
            return out
        given = next((a.dtype for a in (*args, *kwargs.values()) if _floating(a)), None)
        return cast(out, given or self.own_dtype)

    def check(self, part: nn.Module | None = None, wait: bool = False) -> bool:
        """Compare a part of the network, by default all of it, with what was assumed; renew that where it differs.

        Returns:
            Whether no attribute of a module in it has changed since it was last remembered.
        """
        part = self.root if part is None else part
        if self.root.training or _capturing():
            return False
        guard = self.guards.get(part)
        if guard is not None and not self.stale:
            holds, unchanged = guard.compare(wait)
            if holds:
                return unchanged
        with self.lock:
            if self.guards.get(part) is not guard:
                return False  # another thread did it
            new = Guard(part, self.stand_ins)
            # What other calls derived from the same weights must not outlive a change that only those would see.
            if (
                guard is not None
                or self.stale
                or not all(g.compare(wait)[0] for g in self.guards.values() if new.overlaps(g))
            ):
                self.renew()
                new = Guard(part, self.stand_ins)
            self.guards[part] = new
            return True

    def renew(self) -> None:
        """Look at every module again, drop what was derived from weights, and choose the dtype."""
        with self.lock:
            self.stale = False
            self.epoch = next(_numbers)
            self.guards, self.known_prompts = {}, {}
            self.own_dtype = _own_dtype(self.root)
            inner = {entry.module: entry.inner for entry in self.entries if entry.inner is not None}
            for module, stand_in in (self.stand_ins | inner).items():
                stand_in.reason = self._reason(module, stand_in)
                stand_in.forget()
                stand_in.look()
            blocks = [s for s in (self.stand_ins | inner).values() if isinstance(s, Resnet) and s.timed]
            self.embeddings.register([s for s in blocks if s.reason is None])
            for module in self.root.modules():
                if name_of(module) in TAILS:
                    self._tail(module)
            if self.invariant:
                self._settle()
            self.whole = False
            known = is_whole(self.root, self.stand_ins)
            self.dtype = self._choose_dtype(known)
            self.whole = known and self.dtype in DTYPES
            self.replays.forget(serves=self.whole and not self.invariant and _device(self.root).type == "cpu")
            if self.dtype not in DTYPES:
                for stand_in in self.stand_ins.values():
                    if not isinstance(stand_in, Entry):
                        stand_in.reason = f"nothing is computed in {str(self.dtype).removeprefix('torch.')} here"
            # What is looked at now is what the next call is compared with, also if it is the first one, or a part's.
            self.guards[self.root] = Guard(self.root, self.stand_ins)

    def _reason(self, module: nn.Module, stand_in: StandIn) -> str | None:
        if isinstance(stand_in, (Entry, Single)):
            return None
        forward = module.__dict__.get("forward")
        if forward is not stand_in and getattr(forward, "inner", None) is not stand_in:
            return "its forward was replaced since"
        if module.training:
            return "it is in training mode"
        stand_in.reason = None  # what stands in for a block's layers was asked before
        floating = filter(Tensor.is_floating_point, module.parameters())
        if self.requested == "auto" and any(p.dtype != self.own_dtype for p in floating):
            return "its weights have another dtype than the network's first"  # as norms that a library keeps in float32
        if isinstance(stand_in, (TimeProjection, TimeEmbedding)):
            whose = self.root.__dict__.get("forward")
            own = isinstance(whose, Entry) and whose.previous is None and plans_embeddings(self.root)
            if not own or hooked(self.root):
                return "the network's forward is not its class's"
            return "it has hooks" if hooked(module) else replaced_method(module)
        if isinstance(stand_in, AbsorbedSiLU):
            return "it has hooks" if hooked(module) else replaced_method(module)
        return reason_of(module, type(stand_in))

    def _tail(self, tail: Any) -> None:
        """Let the last GroupNorm do the SiLU's work while the forward that calls them is the class's own."""
        norm, act = stand_in_of(tail.conv_norm_out, GroupNorm), stand_in_of(tail.conv_act, AbsorbedSiLU)
        if norm is None:
            return
        forward = tail.__dict__.get("forward")
        own = forward is None or (isinstance(forward, StandIn) and forward.previous is None)
        norm.silu = own and act is not None and not hooked(tail.conv_norm_out)

    def _choose_dtype(self, known: bool) -> torch.dtype:
        """What was asked for while the parameters keep the dtype that they had; a network that was moved to another
        one, as an SDXL's autoencoder is before it decodes, is computed in that.
        """
        if self.own_dtype != self.first_dtype:
            # Of several, as layer-wise casting leaves them, the widest: nothing is rounded that was not before.
            dtypes = {p.dtype for p in self.root.parameters() if p.is_floating_point()}
            return max(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=self.own_dtype)
        if isinstance(self.requested, torch.dtype):
            return self.requested
        native = known and self.own_dtype == torch.float32 and computes_bfloat16(self.root)
        return torch.bfloat16 if native else self.own_dtype

    def unsuitable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether something looks at, or changes, every operation of a call, so that the network's own must run:
        tracing, function transforms, fake or other tensors, autocast, hooks of all modules.
        """
        if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() or _transformed():
            return True
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return True
        device = None
        for t in _tensors((args, kwargs)):
            if type(t) not in (Tensor, nn.Parameter) or t.is_meta or t.layout != torch.strided:
                return True
            device = device or (t.device if t.ndim else None)  # a timestep may be a number on the host
        return device is not None and (torch.is_autocast_enabled(device.type) or device != _device(self.root))

    # ---- what stand-ins ask for

    def prompt_number(self, prompt: Tensor) -> int | None:
        """A number for a prompt, the same for as long as its numbers are; None where that cannot be told cheaply."""
        local = self.local
        if self.invariant:
            return None  # each sample's is a tensor of its own, made for the call
        if local.prompt[0] is prompt:
            return local.prompt[1]
        number = None
        if prompt.device.type == "cpu":
            known = self.known_prompts
            number = next((n for n, seen in known.items() if _equal(seen, prompt)), None)
        elif not prompt.is_inference() and not _capturing():
            known = self.known_prompts
            number = next((n for n, seen in known.items() if seen[0] is prompt and seen[1] == prompt._version), None)
        else:
            return None
        if number is None:
            number = next(_numbers)
            seen: Any = prompt.clone() if prompt.device.type == "cpu" else (prompt, prompt._version)
            with self.lock:
                recent = dict(list(self.known_prompts.items())[1 - PROMPTS :])
                self.known_prompts = recent | {number: seen}
        local.prompt = prompt, number
        return number

    def planned_row(self) -> tuple[Tensor, Tensor] | None:
        """The embedding and the blocks' rows that a sampler has planned for this call; None where there are none, or
        where weights or blocks have changed since, so that they and their order are others.
        """
        planned = self.local.planned
        return None if planned is None or planned[0] != self.epoch else planned[1:]

    def rows(self, times: Tensor) -> PlannedEmbeddings | None:
        """The embeddings of a plan's timesteps [rows], where the network takes its time by an embedding that is known.

        Waits for the guard, so that the first step of a sampling is computed with the weights that are there.
        """
        self.check(wait=True)
        model: Any = self.root
        if self.root.training or not plans_embeddings(model) or not self.embeddings.blocks:
            return None
        parts = ((model.time_proj, TimeProjection), (model.time_embedding, TimeEmbedding))
        if any(stand_in_of(part, kind) is None for part, kind in parts):
            return None
        return PlannedEmbeddings(self, times)

    # ---- what others ask for

    def stamp(self) -> tuple[int, int]:
        """What a captured graph belongs to: another network, other weights or other stand-ins have another one."""
        self.check(wait=True)
        return self.number, self.epoch

    def kept_weights(self) -> list[Any]:
        """All that its stand-ins have bound and packed, for a graph that reads it."""
        held: list[Any] = [self.embeddings.joined, list(self.root.parameters())]
        for stand_in in self.stand_ins.values():
            for part in (stand_in, getattr(stand_in, "inner", None), getattr(stand_in, "pixels", None)):
                if part is not None:
                    held += [dict(part.bound), dict(part.packed)]
        return held

    def report(self) -> NetworkReport:
        return NetworkReport(self)

    def counts(self) -> Rows:
        """(class, how many, what was done); not the layers inside a block that was replaced as a whole."""
        self.check()
        used = {m: s for m, s in self.stand_ins.items() if s.reason is None}
        inside = {part for m, s in used.items() if isinstance(getattr(s, "inner", s), WHOLE) for part in m.modules()}
        inside -= {m for m, s in used.items() if isinstance(getattr(s, "inner", s), WHOLE)}
        found = Counter((type(m).__name__, self._does(s)) for m, s in used.items() if m not in inside)
        return tuple((kind, count, summary) for (kind, summary), count in found.items())

    def _does(self, stand_in: StandIn) -> str:
        """What a stand-in does; in an invariant network also how its batches are computed."""
        inner: StandIn = getattr(stand_in, "inner", None) or stand_in
        summary = (self.invariant and inner.summary_alone) or stand_in.summary
        if not self.takes_batches or isinstance(inner, Entry):
            return summary
        how = "sample by sample" if inner.of_batch is None else inner.of_batch
        return f"{summary}; {how}" if how else summary

    def reasons(self) -> Rows:
        """(class, how many, why) of what is as it was."""
        self.check()
        found: Counter[tuple[str, str]] = Counter()
        for m in inside_out(self.root):
            stand_in = self.stand_ins.get(m)
            kind = KNOWN.get(name_of(m))
            if stand_in is not None:
                reason = stand_in.reason
            elif kind is not None:
                reason = reason_of(m, kind)
                reason = None if name_of(m).endswith("Sequential") else reason or self.left.get(m)
            else:
                owner = isinstance(m, LAYERS) or any(True for _ in m.parameters(recurse=False))
                reason = kept_as(m) if owner and name_of(m) not in EMBEDDINGS else None
            if reason is not None:
                found[type(m).__name__, reason] += 1
        return tuple((kind, count, why) for (kind, why), count in found.items())


_numbers = itertools.count(1)


def install(
    module: nn.Module, dtype: torch.dtype | str = "auto", exact: bool = False, kinds: dict[str, Any] = KNOWN,
    invariant: bool = False,
) -> Network:  # fmt: skip
    """Put stand-ins into a network; raises ValueError where nothing is known, or the promise cannot be kept."""
    with INSTALLING:
        return Network(module, dtype, exact, kinds, invariant)


def network_of(module: Any) -> Network | None:
    """What was put into a module itself, or None; a compiled module runs what it traced."""
    found = module.__dict__.get(RECORD) if isinstance(module, nn.Module) else None
    return found if isinstance(found, Network) else None


def networks_in(module: Any) -> list[Network]:
    """What was put into a module and those inside it."""
    return [found for m in module.modules() if (found := network_of(m)) is not None]


def computes_bfloat16(module: nn.Module) -> bool:
    """Whether the device of a module's parameters computes in bfloat16 natively."""
    device = _device(module)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    has = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(f is not None and f() for f in has)


def _entries(root: Any) -> list[nn.Module]:
    """The modules by which a network is entered: itself, and its parts where encode and decode call those."""
    if name_of(root) in AUTOENCODERS:
        parts = [getattr(root, name) for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")]
        return [part for part in parts if part is not None]
    if hasattr(root, "encode") or hasattr(root, "decode"):
        return [*(child for child in root.children() if type(child) is not nn.ModuleList), root]
    return [root]


def _own_dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a structure of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors(v)]
    return []


def _equal(seen: Tensor, prompt: Tensor) -> bool:
    return seen.shape == prompt.shape and seen.dtype == prompt.dtype and torch.equal(seen, prompt)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _transformed() -> bool:
    """Whether vmap, jvp or another function transform, or forward-mode differentiation, is at work."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0
