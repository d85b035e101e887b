"""What is kept of a set of pictures: the moments of its features, and some of them, drawn at random; in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import numpy as safetensors
from torch import Tensor

from fastdiff.checks import check_int
from fastdiff.evaluation.distances import NEIGHBOURS, Moments
from fastdiff.evaluation.extractors import Features, Identity
from fastdiff.evaluation.sets import Pictures
from fastdiff.files import atomic_write

SUBSET = 10_000  # features that are kept of a set
FEWEST = NEIGHBOURS + 1  # pictures of a set, or of each half of the real one
PARTS = ("first", "second", "rest")
_BLOCK = 1024  # features of a part whose moments are taken at a time
_WHAT, _VERSION = "fastdiff.statistics", 1


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a set's pictures, drawn at random: their moments, and features float32 [at most n, D] of some of them."""

    moments: Moments
    kept: Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """A set of pictures as its features tell it.

    Attributes:
        name: the set's. told: what it was, in words.
        features: which. side: of the pictures, in pixels, as they were read.
        parts: the set cut at random into two of one number (of generated pictures the second may be smaller) and the
            rest. The two are what is compared at equal numbers.
    """

    name: str
    told: str
    features: Identity
    side: int
    parts: tuple[Part, Part, Part]

    @property
    def moments(self) -> Moments:
        first, second, rest = (part.moments for part in self.parts)
        return first.join(second).join(rest)

    @property
    def kept(self) -> Tensor:
        return torch.cat([part.kept for part in self.parts])

    @classmethod
    def of(
        cls, pictures: Pictures, features: Features, *, first: int, subset: int = SUBSET, progress: bool = False
    ) -> Statistics:
        """Walk a set once, batch by batch; what is in memory does not grow with it.

        first: pictures of the first part, and of the second if there are so many. subset: features to keep.
        """
        check_int("subset", subset, 2 * FEWEST, 1 << 24)
        second = min(first, pictures.count - first)
        sizes = (first, second, pictures.count - first - second)
        kept = _shares(subset, sizes)
        roles = _roles([count for size, keep in zip(sizes, kept, strict=True) for count in (keep, size - keep)])
        parts = [_Collector(), _Collector(), _Collector()]
        width = 0
        for images in pictures.batches(features.channels, progress):
            found = features(images)
            width = found.shape[1]
            drawn = torch.tensor([next(roles) for _ in range(len(found))], device="cpu")
            for number, part in enumerate(parts):
                part.add(found[drawn // 2 == number], found[drawn == 2 * number])
        collected = tuple(part.part(width) for part in parts)
        return cls(pictures.name, pictures.told, features.identity, pictures.side, collected)  # type: ignore[arg-type]

    def save(self, path: Path) -> None:
        """An .npz or .safetensors, written whole or not at all."""
        header = _Header(
            what=_WHAT, version=_VERSION, name=self.name, told=self.told, features=self.features, side=self.side,
            n=tuple(part.moments.n for part in self.parts),  # type: ignore[arg-type]
        )  # fmt: skip
        arrays = {
            f"{name}_{of}": np.ascontiguousarray(tensor.numpy())
            for name, part in zip(PARTS, self.parts, strict=True)
            for of, tensor in (("mean", part.moments.mean), ("root", part.moments.root), ("kept", part.kept))
        }
        text = msgspec.json.encode(header).decode()
        with atomic_write(path) as file:
            if path.suffix == ".npz":
                np.savez(file, header=np.array(text), **arrays)  # type: ignore[arg-type]  # numpy's own option is a bool
            else:
                file.write(safetensors.save(arrays, {"header": text}))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """What ``save`` wrote; ValueError for any other file, and for one that was damaged."""
        try:
            text, arrays = _read(path)
            header = msgspec.json.decode(text, type=_Header)
            if (header.what, header.version) != (_WHAT, _VERSION):
                raise ValueError(f"it is {header.what!r}, version {header.version}")
            return cls(header.name, header.told, header.features, header.side, _parts(header.n, arrays))
        except Exception as error:  # damaged bytes raise nearly anything
            told = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} holds no statistics of `fastdiff evaluate --save`: {told}") from error


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    what: str
    version: int
    name: str
    told: str
    features: Identity
    side: int
    n: tuple[int, int, int]


def holds_statistics(path: Path) -> bool:
    """Whether a file is one that ``Statistics.save`` may have written: a .safetensors, or an npz with a header."""
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return "header" in arrays
        except Exception:  # damaged, or no npz: whoever reads its pictures says so
            return False
    return path.suffix == ".safetensors" and path.is_file()


# ---- walking a set


class _Collector:
    """The moments of a part, in blocks that batches do not move, and the features that are kept of it."""

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._waiting: list[Tensor] = []
        self._kept: list[Tensor] = []

    def add(self, features: Tensor, kept: Tensor) -> None:
        self._waiting.append(features)
        self._kept.append(kept)
        while sum(map(len, self._waiting)) >= _BLOCK:
            waiting = torch.cat(self._waiting)
            self._join(waiting[:_BLOCK])
            self._waiting = [waiting[_BLOCK:]]

    def part(self, width: int) -> Part:
        waiting = torch.cat([torch.zeros(0, width), *self._waiting])
        if len(waiting):
            self._join(waiting)
        return Part(self._moments or Moments.none(width), torch.cat([torch.zeros(0, width), *self._kept]))

    def _join(self, features: Tensor) -> None:
        found = Moments.of(features)
        self._moments = found if self._moments is None else self._moments.join(found)


def _shares(subset: int, sizes: tuple[int, int, int]) -> list[int]:
    """How many features are kept of each part: of the first two as many as may be, and alike."""
    kept = [min(size, subset // 2) for size in sizes[:2]] + [0]
    for i, size in enumerate(sizes):
        kept[i] += min(size - kept[i], subset - sum(kept))
    return kept


def _roles(counts: list[int]) -> Iterator[int]:
    """The numbers 0, 0, …, 1, 1, … in a random order that never changes, drawn one after another without a list of them
    (Algorithm S of Knuth's volume 2, Section 3.4.2).
    """
    random = np.random.RandomState(0)  # its stream is frozen by numpy's promise
    left = np.array(counts, np.int64)
    while total := int(left.sum()):
        role = int(np.searchsorted(left.cumsum(), random.randint(total), side="right"))
        left[role] -= 1
        yield role


# ---- files


def _read(path: Path) -> tuple[str, dict[str, np.ndarray[Any, Any]]]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return str(arrays["header"]), {name: arrays[name] for name in arrays.files if name != "header"}
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    told = msgspec.json.decode(content[8 : 8 + length])
    return told["__metadata__"]["header"], safetensors.load(content)


def _parts(counts: tuple[int, int, int], arrays: dict[str, np.ndarray[Any, Any]]) -> tuple[Part, Part, Part]:
    found = []
    width = arrays["first_mean"].shape[-1]
    for name, n in zip(PARTS, counts, strict=True):
        mean, root, kept = (torch.from_numpy(arrays[f"{name}_{of}"]) for of in ("mean", "root", "kept"))
        shapes = {"mean": (mean, (width,)), "root": (root, (len(root), width)), "kept": (kept, (len(kept), width))}
        for of, (tensor, shape) in shapes.items():
            if tensor.shape != shape or tensor.dtype != (torch.float32 if of == "kept" else torch.float64):
                raise ValueError(f"{name}_{of} is {tensor.dtype} {list(tensor.shape)}, and not {list(shape)}")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name}_{of} holds NaN or infinity")
        if len(kept) > n or n < 0:
            raise ValueError(f"it keeps {len(kept)} features of {n} pictures")
        found.append(Part(Moments(n, mean, root), kept))
    return tuple(found)  # type: ignore[return-value]
