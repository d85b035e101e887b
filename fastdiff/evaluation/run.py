"""The two evaluations of the command line: a text-to-image model on a data set that has a judge, and two folders."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.checks import check_int
from fastdiff.evaluation.distances import NEIGHBOURS, Distances
from fastdiff.evaluation.distances import table as distances_table
from fastdiff.evaluation.features import ImageNetFeatures
from fastdiff.evaluation.judge import Judge, Scores
from fastdiff.training.captioned import Captioned
from fastdiff.training.pictures import is_picture, read_picture

SUBSET = "emoji-240"  # of whose cells the factors are complete; rows that tell no subset belong to it
FEWEST = 2 * (NEIGHBOURS + 1)  # real pictures, so that half of them have neighbours enough
_BATCH = 64


# ---- a model


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


# ---- two folders


def compare_folders(
    real: Path, fake: Path, features: Callable[[Tensor], Tensor], *, size: int | None = None, progress: bool = False
) -> dict[str, Distances]:
    """Distances of two folders of pictures, and the floor: of one half of the real ones to the other.

    The Fréchet distance depends on the number of pictures, so that "as many" and "floor" are of one number.
    size: pixels a side to which pictures are cropped and resized; None asks that all are square and of one size.
    Raises FileNotFoundError, NotADirectoryError or ValueError: an empty folder, too few pictures, several sizes.
    """
    files = {folder: _pictures(folder) for folder in (real, fake)}
    for folder, least in ((real, FEWEST), (fake, NEIGHBOURS + 1)):
        if len(files[folder]) < least:
            raise ValueError(f"{folder} holds {len(files[folder])} pictures; at least {least} are needed")
    side = _one_size([*files[real], *files[fake]]) if size is None else check_int("size", size, 1, 1 << 13)
    a, b = (torch.cat([features(batch) for batch in _batches(files[f], side, progress)]) for f in (real, fake))
    n = min(len(a) // 2, len(b))
    a, b = a[_drawn(range(len(a)), len(a))], b[_drawn(range(len(b)), len(b))]
    return {
        "all": Distances.between(b, a),
        "as many": Distances.between(b[:n], a[n : 2 * n]),
        "real (floor)": Distances.between(a[:n], a[n : 2 * n]),
    }


def _pictures(folder: Path) -> list[Path]:
    if not folder.exists():
        raise FileNotFoundError(f"no folder {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    files = [path for path in sorted(folder.rglob("*")) if is_picture(path)]
    if not files:
        raise ValueError(f"{folder} holds no picture that Pillow reads by its name (.png, .jpg, …)")
    return files


def _one_size(files: Sequence[Path]) -> int:
    """The side of all pictures, of which only the headers are read."""
    side = 0
    for file in files:
        try:
            with Image.open(file) as opened:
                width, height = opened.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read the picture {file}: {error}") from error
        side = side or width
        if (width, height) != (side, side):
            raise ValueError(
                f"pictures must be square and of one size; {file} is {width}×{height}, and {files[0]} {side} wide: "
                "a size (--size) crops and resizes all"
            )
    return side


def _batches(files: Sequence[Path], side: int, progress: bool) -> Iterator[Tensor]:
    starts = range(0, len(files), _BATCH)
    for start in tqdm(starts, desc=str(files[0].parent), unit="batch", disable=not progress, leave=False):
        pixels = [read_picture(file, (side, side)).expand(3, -1, -1) for file in files[start : start + _BATCH]]
        yield _images(torch.stack(pixels))


# ---- both


def _drawn(numbers: Sequence[int], count: int) -> Tensor:
    """int64 [count]: some of the numbers, in an order that never changes."""
    shuffle = np.random.RandomState(0).permutation(len(numbers))  # its stream is frozen by numpy's promise
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")[torch.from_numpy(shuffle)[:count]]


def _images(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1
