"""Two sets of pictures compared, beside two halves of the real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.evaluation.distances import Distances
from fastdiff.evaluation.extractors import Features
from fastdiff.evaluation.sets import Pictures, open_pictures
from fastdiff.evaluation.statistics import FEWEST, SUBSET, Statistics, holds_statistics


def compare_sets(
    fake: Path,
    real: Path,
    features: Features,
    *,
    size: int | None = None,
    subset: int = SUBSET,
    progress: bool = False,
) -> tuple[dict[str, Distances], list[str]]:
    """Distances of two sets, each a folder, a tar, an npz or saved statistics; and what each of them was, in words.

    "all" is of all pictures, "as many" and "real (floor)" are of one number on each side, drawn at random: the Fréchet
    distance depends on it. The floor is of one half of the real pictures to the other, or of as many as there are fake
    ones, whichever is less.
    size: pixels a side to which pictures are cropped and resized; None asks that all are square and of one size.
    subset: features of each set of which kernel distance, precision and recall are computed.
    Raises FileNotFoundError, NotADirectoryError or ValueError: an empty folder, too few pictures, several sizes,
    statistics of other features.
    """
    opened = {path: _open(path, features, size) for path in (real, fake)}
    counts = {path: found.moments.n if isinstance(found, Statistics) else found.count for path, found in opened.items()}
    for path, least in ((real, 2 * FEWEST), (fake, FEWEST)):
        if counts[path] < least:
            raise ValueError(f"{path} holds {counts[path]} pictures; at least {least} are needed")
    sides = {path: found.side for path, found in opened.items()}
    if sides[real] != sides[fake]:
        raise ValueError(
            f"pictures must be of one size; those of {fake} have {sides[fake]} pixels a side, those of {real} "
            f"{sides[real]}: a size (--size) crops and resizes all"
        )
    found, half = opened[real], counts[real] // 2
    if not isinstance(found, Statistics):
        other = opened[fake]
        most = other.parts[0].moments.n if isinstance(other, Statistics) else other.count
        found = Statistics.of(found, features, first=min(half, most), subset=subset, progress=progress)
    samples = opened[fake]
    if not isinstance(samples, Statistics):
        first = min(found.parts[0].moments.n, samples.count)
        samples = Statistics.of(samples, features, first=first, subset=subset, progress=progress)
    return compare(samples, found), [samples.told, found.told]


def statistics_of(
    path: Path, features: Features, *, size: int | None = None, subset: int = SUBSET, progress: bool = False
) -> Statistics:
    """Of a set of pictures that others are to be compared with."""
    pictures = open_pictures(path, size)
    if pictures.count < 2 * FEWEST:
        raise ValueError(f"{path} holds {pictures.count} pictures; at least {2 * FEWEST} are needed")
    return Statistics.of(pictures, features, first=pictures.count // 2, subset=subset, progress=progress)


def compare(fake: Statistics, real: Statistics) -> dict[str, Distances]:
    """Distances of two sets by what is kept of them."""
    first, second = real.parts[0], real.parts[1]
    samples = fake.parts[0]
    found = {"all": Distances.of(fake.moments, real.moments, fake.kept, real.kept)}
    n = min(len(samples.kept), len(first.kept), len(second.kept))
    a, b, c = (_drawn(part.kept, n) for part in (first, second, samples))
    if samples.moments.n == first.moments.n == second.moments.n:
        found["as many"] = Distances.of(samples.moments, second.moments, c, b)
        found["real (floor)"] = Distances.of(first.moments, second.moments, a, b)
    else:  # a file's halves are larger than the set that is compared with it
        found["as many"], found["real (floor)"] = Distances.between(c, b), Distances.between(a, b)
    return found


def _open(path: Path, features: Features, size: int | None) -> Pictures | Statistics:
    if not holds_statistics(path):
        return open_pictures(path, size)
    found = Statistics.load(path)
    if found.features != features.identity:
        raise ValueError(f"{path} holds features of {found.features}, and those asked for are of {features.identity}")
    if size is not None and found.side != size:
        raise ValueError(f"{path} is of pictures of {found.side} pixels a side; size (--size) is {size}")
    return found


def _drawn(features: Tensor, count: int) -> Tensor:
    """Some of them, by an order that never changes."""
    if count == len(features):
        return features
    order = np.random.RandomState(0).permutation(len(features))[:count]
    return features[torch.from_numpy(np.sort(order))]
