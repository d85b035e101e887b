"""What is to be learned, and all that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.plan.plan import Plan
from fastdiff.schedules.level import Schedule
from fastdiff.tuning.runs import Probed, Runs
from fastdiff.tuning.start import Start


@dataclass(frozen=True)
class Task:
    """A network's runs, where they start, and where they should end."""

    runs: Runs
    start: Start
    schedule: Schedule
    ends: Tensor  # the teacher's, of all samples
    held_out: int
    device: torch.device
    probed: Probed
    iterations: int
    progress: bool

    @property
    def images(self) -> int:
        """How many samples are learned from."""
        return self.runs.shape[0] - self.held_out

    def error(self, plan: Plan) -> float:
        """A plan's distance to the teacher on held-out noise; infinite where its run is not finite."""
        total = self.runs.shape[0]
        try:
            found = self.runs.ends(plan, self.images, total)
        except FloatingPointError:
            return math.inf
        return self.runs.distance(found, self.ends[self.images :], self.device)

    def bar(self) -> Iterator[int]:
        from tqdm.auto import tqdm

        yield from tqdm(range(self.iterations), desc="tune", unit="it", disable=not self.progress)
