"""What stands in for a module's forward, and the weights that it keeps in another form."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastdiff.acceleration.time_embedding import Conditioning

T = TypeVar("T")
_making = threading.RLock()


@dataclass(frozen=True)
class Context:
    """What the stand-ins of one network share: the dtype of its arithmetic, its conditioning, and whether convolutions
    are computed as they stand, not of summed or transformed weights.
    """

    dtype: torch.dtype
    conditioning: Conditioning
    exact: bool = False


class Fast(ABC):
    """Stands in for ``module.forward``, as an attribute of the one instance: ``run`` computes the same function.

    The module's parameters stay what and where they are. Its own forward runs where gradients are recorded, in
    training mode and under torch.compile, which traces what it knows.

    Attributes:
        does: what it does, for the report.
    """

    does: ClassVar[str]

    def __init__(self, module: Any, context: Context) -> None:
        self.module = module
        self.dtype, self.conditioning = context.dtype, context.conditioning

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this module is not one that ``run`` computes, or None."""
        return None

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward computes, of the same arguments."""

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.module.training:
            return self.original(*args, **kwargs)
        return self.run(*args, **kwargs)


class Made(Generic[T]):
    """A value made from tensors, and made anew after one of them was replaced, moved or written to, or the key differs.

    It is not copied or pickled with the module that holds it: it is made again where it is needed.
    """

    def __init__(self) -> None:
        self._made: tuple[list[Any], T, Any] | None = None

    def get(self, sources: Sequence[Tensor | None], make: Callable[[], T], key: Any = None) -> T:
        made = self._made
        if made is None or made[2] != key or not all(map(_unchanged, made[0], sources)):
            with torch.no_grad():
                made = self._make(sources, make, key)
        return made[1]

    def _make(self, sources: Sequence[Tensor | None], make: Callable[[], T], key: Any) -> tuple[list[Any], T, Any]:
        with _making:  # one of several threads makes it, and the others take that
            made = self._made
            if made is None or made[2] != key or not all(map(_unchanged, made[0], sources)):
                # The aliases keep the sources' memory from being given to other tensors.
                made = ([None if s is None else (s.detach(), _version(s)) for s in sources], make(), key)
                if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                    return made  # a capture computes nothing: what it leaves is its graph's alone
                _finished(sources)
                self._made = made
            return made

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": None}


def _finished(sources: Sequence[Tensor | None]) -> None:
    """Wait for what was just made on a GPU: another thread may read it on its own stream."""
    device = next((s.device for s in sources if s is not None and s.is_cuda), None)
    if device is not None:
        torch.cuda.current_stream(device).synchronize()


def _unchanged(seen: tuple[Tensor, int] | None, source: Tensor | None) -> bool:
    if seen is None or source is None:
        return seen is source
    alias, version = seen
    same = alias.data_ptr() == source.data_ptr() and alias.dtype == source.dtype and alias.shape == source.shape
    return same and version == _version(source)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def made_by(holder: Any) -> Iterator[Any]:
    """What the ``Made`` in a stand-in, and in the helpers that it holds, have made."""
    for value in vars(holder).values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Made):
                yield part._made
            elif type(part).__module__.startswith("fastdiff.acceleration."):
                yield from made_by(part)


def fast_of(module: Any, kind: type) -> Any:
    """The ``kind`` that stands in for a module, or None."""
    found = module.__dict__.get("forward") if isinstance(module, nn.Module) else None
    return found if isinstance(found, kind) else None


def hooked(*modules: Any) -> bool:
    """Whether a module has hooks, which would not run where its forward is not called."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for module in modules for name in names)
