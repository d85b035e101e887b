"""What stand-ins assumed of the modules below one of them, written down to be compared before the next call."""

from __future__ import annotations

import threading
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.acceleration.module import ADDRESS, StandIn

SAMPLED = 8  # elements of each weight that are compared; an optimiser, an average or an adapter changes nearly all
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Guard:
    """A snapshot of modules and weights, as flat lists that are compared in a few microseconds a hundred modules.

    Modules: their classes, children, forwards, hooks, training flags, compiled calls, and the attributes that their
    stand-ins read. Weights: identity, address, strides, dtype and version, and a few elements of each, since writes
    through ``.data``, by fused optimisers, in inference mode or through NumPy change nothing but the numbers.
    """

    def __init__(self, root: nn.Module, stand_ins: dict[nn.Module, StandIn]) -> None:
        self.root, self.modules = root, list(root.modules())
        self.dicts = [m.__dict__ for m in self.modules]
        self.child_dicts = [d["_modules"] for d in self.dicts if d["_modules"]]
        self.weight_dicts = [d["_parameters"] for d in self.dicts if d["_parameters"]]
        self.hooks = [d[name] for d in self.dicts for name in ("_forward_hooks", "_forward_pre_hooks")]
        # What else can change what a known module computes: an attribute that its stand-in reads, a new one that hides
        # a method of its class (``conv._conv_forward = ...``), the class's forward.
        known = [m for m in self.modules if m in stand_ins]
        self.read = [(m.__dict__, name) for m in known for name in stand_ins[m].reads]
        self.read += [(d, "inplace") for d in self.dicts if "inplace" in d]
        self.processors = [d["processor"] for d in self.dicts if "processor" in d]
        self.known_dicts = [m.__dict__ for m in known]
        self.kinds: list[Any] = list(dict.fromkeys(map(type, self.modules)))
        self.buffer_dicts = [d["_buffers"] for d in self.dicts if d["_buffers"]]
        self.structure, self.options = self._structure(), self._options()
        self.weights = list(self._weights())
        self.remember()
        # Sparse weights have neither address nor strides, and nothing is derived from them.
        self.tensors = [w for w in self.weights if w is not None and w.layout == torch.strided]
        self.versioned = [w for w in self.tensors if not w.is_inference()]
        self.state = self._state()
        self.samples = [Samples(views) for views in _sampled(self.tensors)]

    def _structure(self) -> tuple[Any, ...]:
        """What no attribute tells."""
        return (
            list(map(type, self.modules)),
            list(map(len, self.hooks)),
            [kind.forward for kind in self.kinds],
            [nn.Conv2d._conv_forward, *(type(p).__call__ for p in self.processors)],
        )

    def _options(self) -> tuple[Any, ...]:
        """The attributes that matter."""
        return (
            [d.get("forward") for d in self.dicts],
            [d.get("training") for d in self.dicts],
            [d.get("_compiled_call_impl") for d in self.dicts],
            [d.get(name) for d, name in self.read],
            list(map(len, self.known_dicts)),
            list(chain.from_iterable(map(dict.values, self.child_dicts))),
        )

    def _attributes(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, chain(self.dicts, self.child_dicts))))

    def _buffers(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.buffer_dicts)))

    def remember(self) -> None:
        """Take every attribute, child and buffer as it is now for what ``compare`` finds unchanged."""
        self.attributes, self.buffers = self._attributes(), self._buffers()

    def _unchanged(self) -> bool:
        """Nearly always they are the very objects, which lists compare by their addresses alone."""
        try:
            same = self._attributes() == self.attributes
        except Exception:  # a tensor, an array or others' object that cannot be compared
            return False
        now = self._buffers()
        return same and len(now) == len(self.buffers) and all(map(is_, now, self.buffers))

    def _weights(self) -> chain[Tensor | None]:
        return chain.from_iterable(map(dict.values, self.weight_dicts))

    def _state(self) -> tuple[Any, ...]:
        tensors = self.tensors
        return (
            list(map(ADDRESS, tensors)),
            [w._version for w in self.versioned],
            list(map(Tensor.stride, tensors)),
            [w.dtype for w in tensors],
        )

    def overlaps(self, other: Guard) -> bool:
        """Whether one of the two looks at the other's root, and so at some of its weights."""
        return other.root in self.modules or self.root in other.modules

    def compare(self, wait: bool = False) -> tuple[bool, bool]:
        """Whether everything that matters is as it was, and whether every attribute is, also those that no stand-in
        reads. On a GPU a change of elements alone is seen in the next call, unless waited for.
        """
        unchanged = self._unchanged()
        if not unchanged and self._options() != self.options:
            return False, False
        now = list(self._weights())
        if len(now) != len(self.weights) or not all(map(is_, now, self.weights)):
            return False, False
        if self._structure() != self.structure or self._state() != self.state:
            return False, False
        return all([samples.same(wait) for samples in self.samples]), unchanged


class Samples:
    """Elements of weights of one device and dtype, and whether they are still what they were."""

    def __init__(self, views: list[Tensor]) -> None:
        self.views, self.seen = views, torch.cat(views)
        # NumPy puts two hundred small arrays side by side in a sixth of the time that torch takes.
        self.arrays = [view.numpy() for view in views] if self.seen.device.type == "cpu" else None
        self.pending: tuple[Tensor, torch.cuda.Event] | None = None  # a GPU's comparison that has not been read yet
        self.lock = threading.Lock()

    def same(self, wait: bool) -> bool:
        if self.arrays is not None:
            return np.array_equal(np.concatenate(self.arrays), self.seen.numpy())
        if not self.seen.is_cuda:
            return torch.equal(torch.cat(self.views), self.seen)
        with self.lock, torch.cuda.device(self.seen.device):
            before = self._read()
            differs = torch.empty(1, dtype=torch.bool, device="cpu", pin_memory=True)
            differs.copy_((torch.cat(self.views) != self.seen).any(), non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self.pending = differs, done
            return (self._read() if wait else True) and before

    def _read(self) -> bool:
        if self.pending is None:
            return True
        differs, done = self.pending
        self.pending = None
        done.synchronize()
        return not bool(differs)


def _sampled(weights: list[Tensor]) -> list[list[Tensor]]:
    """Views [at most SAMPLED] of each weight's elements, along its diagonal, as integers; by device and dtype."""
    groups: dict[Any, list[Tensor]] = {}
    for w in weights:
        if type(w) not in (Tensor, nn.Parameter) or w.is_meta or w.is_complex():
            continue  # nothing is derived from such weights
        if w.numel() == 0:
            continue
        w = w.detach()
        count = min(SAMPLED, max(w.shape, default=1))
        steps = [size // count for size in w.shape]
        stride = sum(step * s for step, s in zip(steps, w.stride(), strict=True))
        view = w.as_strided((count,), (stride,)).view(_BITS[w.element_size()])
        groups.setdefault((w.device, view.dtype), []).append(view)
    return list(groups.values())
