"""The class of each image of a job: what a class-conditional network is told."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.trained import TrainedModel
from fastdiff.pictures.values import to_plain

BALANCED = "balanced"


class Labels:
    """The labels of a job's images, and the network's keywords for some of them.

    labels: "balanced", class i % C for image i; or a file with a class a line, by its name or number, of at least
        ``num`` lines. None is "balanced", or none for a model without classes.
    """

    def __init__(self, trained: TrainedModel, labels: str | os.PathLike[str] | None, num: int) -> None:
        self.trained, self.classes, self._listed = trained, trained.classes, None
        if not self.classes:
            if labels is not None:
                raise ValueError(f"labels is {os.fspath(labels)!r}, but this model has no classes")
            self.told = "none"
        elif labels is None or labels == BALANCED:
            self.told = f"{BALANCED} over {len(self.classes)} classes"
        else:
            self._listed = _listed(Path(labels), self.classes, num)
            self.told = f"a file, sha256 {hashlib.sha256(self._listed.numpy().tobytes()).hexdigest()[:16]}"

    def of(self, numbers: range) -> list[int] | None:
        """The labels of these images."""
        if not self.classes:
            return None
        if self._listed is None:
            return [number % len(self.classes) for number in numbers]
        return self._listed[numbers.start : numbers.stop].tolist()


def keywords(trained: TrainedModel, labels: list[int] | None, scale: float | None) -> dict[str, Any]:
    """model_kwargs and uncond_kwargs of a batch of these labels, as a recipe has them."""
    if labels is None:
        return {}
    told = trained.arguments(torch.tensor(labels, dtype=torch.int64), scale)
    return {name: to_plain(name, told[name]) for name in ("model_kwargs", "uncond_kwargs") if name in told}


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
