"""The class of each image of a job: what a class-conditional network is told."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

BALANCED = "balanced"


class Labels:
    """The labels of a job's images.

    classes: the model's; empty for a model without.
    labels: "balanced", class i % C for image i; or a file with a class a line, by its name or number, of at least
        ``num`` lines. None is "balanced", or none for a model without classes.
    """

    def __init__(self, classes: list[str], labels: str | os.PathLike[str] | None, num: int) -> None:
        self._classes, self._listed = len(classes), None
        if not classes:
            if labels is not None:
                raise ValueError(f"labels is {os.fspath(labels)!r}, but this model has no classes")
            self.told = "none"
        elif labels is None or labels == BALANCED:
            self.told = f"{BALANCED} over {len(classes)} classes"
        else:
            self._listed = _listed(Path(labels), classes, num)
            self.told = f"a file, sha256 {hashlib.sha256(self._listed.numpy().tobytes()).hexdigest()[:16]}"

    def of(self, numbers: range) -> list[int] | None:
        """The labels of these images."""
        if not self._classes:
            return None
        if self._listed is None:
            return [number % self._classes for number in numbers]
        labels: list[int] = self._listed[numbers.start : numbers.stop].tolist()
        return labels


def _listed(path: Path, classes: list[str], num: int) -> Tensor:
    """int64 [num]."""
    numbers: dict[str, int] = {str(i): i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    found = torch.empty(num, dtype=torch.int64)
    with open(path, encoding="utf-8") as file:
        i = 0
        for i, line in enumerate(file, 1):
            label = numbers.get(line.strip())
            if label is None:
                of = f"{', '.join(classes[:10])}{' …' * (len(classes) > 10)}, or 0 to {len(classes) - 1}"
                raise ValueError(f"{path}, line {i}: {line.strip()!r} is none of the classes {of}")
            if i <= num:
                found[i - 1] = label
    if i < num:
        raise ValueError(f"{path} has {i} labels, and num is {num}")
    return found
