"""A text-to-image model, evaluated on a data set that has a judge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.checks import check_int
from fastdiff.evaluation.distances import NEIGHBOURS, Distances
from fastdiff.evaluation.distances import table as distances_table
from fastdiff.evaluation.features import ImageNetFeatures
from fastdiff.evaluation.judge import SUBSET, Judge, Scores
from fastdiff.training.captioned import Captioned

_BATCH = 64


def choose_targets(rows: Sequence[dict[str, Any]], part: str, number: int, subset: str = SUBSET) -> Tensor:
    """int64 [number] in rising order: rows of a part, drawn by a generator that never changes."""
    here = [i for i, row in enumerate(rows) if row.get("subset", subset) == subset]
    of_part = [i for i in here if rows[i]["part"] == part]
    if not of_part:
        parts = ", ".join(dict.fromkeys(rows[i]["part"] for i in here))
        raise ValueError(f"no picture belongs to the part {part!r}; there are {parts}")
    if check_int("n", number, 1, 1 << 40) > len(of_part):
        raise ValueError(f"n is {number}, but the part {part!r} has {len(of_part)} pictures")
    return _drawn(of_part, number).sort().values


def draw(pipe: Callable[..., Tensor], captions: Sequence[str], seed: int, progress: bool = False, **how: Any) -> Tensor:
    """One sample a caption, float32 [N, 3, H, W] in [-1, 1], whose noise is that of one batch of all."""
    images = []
    for start in tqdm(range(0, len(captions), _BATCH), desc=f"seed {seed}", disable=not progress, leave=False):
        batch = list(captions[start : start + _BATCH])
        images.append(pipe(batch, seed=seed, sample_offset=start, **how).float().cpu())
        if len(images[-1]) != len(batch):
            raise ValueError(f"the model drew {len(images[-1])} pictures for {len(batch)} captions")
    return torch.cat(images)


def evaluate_model(
    pipe: Callable[..., Tensor],
    data: Captioned,
    *,
    part: str = "held_out",
    n: int = 500,
    seeds: Sequence[int] = (0, 1, 2),
    network: ImageNetFeatures | None = None,
    progress: bool = False,
    **how: Any,
) -> ModelScores:
    """Draw n pictures of a part by their captions, for each seed, and judge them.

    pipe: ``pipe(captions, seed=, sample_offset=, **how)`` gives [B, 3, H, W] in [-1, 1], as `fastdiff.load`'s do.
    data: all of its pictures, ``load_captioned("emoji", part=None, subset=None)``.
    network: of a second judge and of distances; None leaves both out.
    """
    if not data.rows:
        raise ValueError("data has no factors to judge by: it must be a set that tools/emoji.py drew (--data)")
    targets = choose_targets(data.rows, part, n)
    captions = [data.rows[i]["caption"] for i in targets.tolist()]
    judges = {"pooled pixels": Judge(data.rows, data.pixels)}
    if network is not None:
        judges["EfficientNet"] = Judge(data.rows, data.pixels, network.patches, progress=progress)
    found: dict[str, list[Scores]] = {name: [] for name in judges}
    fakes: dict[int, Tensor] = {}
    for seed in seeds:
        images = draw(pipe, captions, seed, progress, **how)
        for name, judge in judges.items():
            found[name].append(judge.judge(images, targets))
        fakes[seed] = images
    distances = {} if network is None else _to_training(fakes, data, targets, network)
    return ModelScores(found, distances, list(seeds))


@dataclass(frozen=True, eq=False)
class ModelScores:
    """What `evaluate_model` found. scores: by judge, a `Scores` a seed. distances: by name, empty without features."""

    scores: dict[str, list[Scores]]
    distances: dict[str, Distances]
    seeds: list[int]

    def __str__(self) -> str:
        parts = [f"judge: {name}\n{Scores.join(scores).table()}" for name, scores in self.scores.items()]
        return "\n\n".join(parts + ([distances_table(self.distances)] if self.distances else []))

    def to_json(self) -> dict[str, Any]:
        """Means and intervals of all seeds, means of each, and the distances."""
        judges = {
            name: {
                "means": Scores.join(scores).means(),
                "seeds": {
                    seed: {key: mean for key, (mean, _, _) in part.means().items()}
                    for seed, part in zip(self.seeds, scores, strict=True)
                },
            }
            for name, scores in self.scores.items()
        }
        return {"judges": judges, "distances": {name: asdict(d) for name, d in self.distances.items()}}


def _to_training(
    fakes: dict[int, Tensor], data: Captioned, targets: Tensor, features: Callable[[Tensor], Tensor]
) -> dict[str, Distances]:
    """Of samples, and of the pictures that they should be, to as many training pictures, none of them a target."""
    asked = set(targets.tolist())
    others = [i for i, row in enumerate(data.rows) if row.get("subset", SUBSET) == SUBSET and row["part"] == "train"]
    others = [i for i in others if i not in asked]
    n = min(len(targets), len(others))
    if n <= NEIGHBOURS:
        warnings.warn(f"no distances: they need more than {NEIGHBOURS} pictures on each side; got {n}", stacklevel=3)
        return {}
    real = features(_images(data.pixels[_drawn(others, n)]))
    truth = features(_images(data.pixels[targets[:n]]))
    found = {f"samples, seed {seed}": Distances.between(features(images[:n]), real) for seed, images in fakes.items()}
    return {**found, "the real ones (floor)": Distances.between(truth, real)}


def _drawn(numbers: Sequence[int], count: int) -> Tensor:
    """int64 [count]: some of the numbers, in an order that never changes."""
    shuffle = np.random.RandomState(0).permutation(len(numbers))  # its stream is frozen by numpy's promise
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")[torch.from_numpy(shuffle)[:count]]


def _images(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1
