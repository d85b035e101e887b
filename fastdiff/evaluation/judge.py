"""A judge that knows the truth: which of all real pictures a sample is nearest to, and what is right about that one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.checks import check_finite, check_image, kind_of
from fastdiff.evaluation.features import pooled_pixels

SUBSET = "emoji-240"  # of whose cells the factors are complete; rows that tell no subset belong to it
FACTORS = ("subject", "tone", "style")
TWINS = 1 / 255  # pooled pixels that are nearer (root mean square, in [-1, 1]) look the same: half a grey level
_Z = 1.959964  # of a normal distribution, 95%
_BATCH = 512


@dataclass(frozen=True, eq=False)
class Scores:
    """What the judge found, a sample each.

    targets, nearest: int64 [B], the picture that was asked for and the real one that is nearest, as rows of the data.
    hits: bool [B] by name: "exact", each factor, and "training", whether the nearest is of emoji-240's part "train",
        which is what `fastdiff train --data emoji` sees.
    psnr: float64 [B], in dB and at most 100, to the picture that was asked for, values clamped to [-1, 1].
    """

    targets: Tensor
    nearest: Tensor
    hits: dict[str, Tensor]
    psnr: Tensor

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Several batches, or draws of other seeds, as one."""
        hits = {name: torch.cat([part.hits[name] for part in parts]) for name in parts[0].hits}
        targets, nearest, psnr = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("targets", "nearest", "psnr")
        )
        return cls(targets, nearest, hits, psnr)

    def means(self) -> dict[str, tuple[float, float, float]]:
        """The mean and the ends of its 95% interval, by name: of the hits Wilson's, of "psnr" the normal one.

        Samples of one target are not independent: where it was drawn more than once, their number is taken down to the
        one at which independent samples would have this variance of the mean (clusters; Kish 1965), and is at least the
        number of targets.
        """
        found = {name: self._share(hit.double()) for name, hit in self.hits.items()}
        mean, error = self.psnr.mean().item(), _Z * _variance_of_mean(self.psnr, self.targets) ** 0.5
        return {**found, "psnr": (mean, mean - error, mean + error)}

    def _share(self, hit: Tensor) -> tuple[float, float, float]:
        mean, fewest = hit.mean().item(), len(self.targets.unique())
        variance = _variance_of_mean(hit, self.targets)
        number = mean * (1 - mean) / variance if variance else fewest
        return mean, *wilson(mean, min(max(number, fewest), len(hit)))

    def table(self) -> str:
        """Lines of text, a mean and its interval each."""
        names = {"training": "nearest is a training picture", "psnr": "PSNR, dB"}
        lines = [f"{'':29}    mean  95% interval"]
        for name, (mean, low, high) in self.means().items():
            digits = 2 if name == "psnr" else 3
            lines.append(f"{names.get(name, name):29}  {mean:6.{digits}f}  {low:.{digits}f} … {high:.{digits}f}")
        return "\n".join([*lines, f"{len(self.targets)} samples of {len(self.targets.unique())} pictures"])


class Judge:
    """Names the real picture that a sample is nearest to, among all of a data set's, whether trained on or held out.

    rows: a dict a picture, with its factors (subject, tone, style), its "part" ("train", or what was held out), and
    its "subset" where it is another than `SUBSET`. pixels: uint8 [N, 3, H, W], the pictures in that order. features:
    what turns images [B, 3, H, W] in [-1, 1] into features [B, D], whose Euclidean distance is the measure; by default
    pooled pixels, see `pooled_pixels`. A second judge, of `ImageNetFeatures`, shows what a model pleased the first with
    alone. progress: a bar.
    Raises TypeError or ValueError for rows and pixels that do not match.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        pixels: Tensor,
        features: Callable[[Tensor], Tensor] | None = None,
        *,
        progress: bool = False,
    ) -> None:
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8:
            got = pixels.dtype if isinstance(pixels, Tensor) else kind_of(pixels)
            raise TypeError(f"pixels must be a tensor of bytes; got {got}")
        if pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) != len(rows) or not len(rows):
            raise ValueError(f"pixels must be [{len(rows)}, 3, H, W], a picture a row; got {list(pixels.shape)}")
        for number, row in enumerate(rows):
            missing = [name for name in (*FACTORS, "part") if row is None or name not in row]
            if missing:
                raise ValueError(f"row {number} lacks {', '.join(missing)}")
        self.pixels, self.features = pixels, features or pooled_pixels
        self.factors = {name: _numbers([row[name] for row in rows]) for name in FACTORS}
        seen = [row["part"] == "train" and row.get("subset", SUBSET) == SUBSET for row in rows]
        self.trained = torch.tensor(seen, device="cpu")
        parts = tqdm(pixels.split(_BATCH), desc="real pictures", disable=not progress, leave=False)
        self.bank = torch.cat([self._features_of(images) for images in map(_images, parts)])

    def judge(self, images: Tensor, targets: Tensor) -> Scores:
        """Of samples [B, 3, H, W] in [-1, 1], on any device, and the rows that they should show, int64 [B].

        A picture that looks like the one that was asked for (`TWINS`) counts as that one.
        """
        check_image(images)
        check_finite("images", images)
        if images.shape[1:] != self.pixels.shape[1:]:
            shape = ", ".join(map(str, self.pixels.shape[1:]))
            raise ValueError(f"images must be [B, {shape}]; got {list(images.shape)}")
        targets = torch.as_tensor(targets, device="cpu")
        if targets.dtype != torch.int64 or targets.shape != images.shape[:1] or not len(targets):
            raise ValueError(f"targets must be int64, a row each of {len(images)} images; got {list(targets.shape)}")
        if targets.min() < 0 or targets.max() >= len(self.pixels):
            raise ValueError(f"targets must be rows of the {len(self.pixels)} pictures")
        batches = zip(images.split(_BATCH), targets.split(_BATCH), strict=True)
        return Scores.join([self._judge(batch.float().cpu().clamp(-1, 1), rows) for batch, rows in batches])

    def _judge(self, images: Tensor, targets: Tensor) -> Scores:
        nearest = self._nearest(self._features_of(images))
        truth = _images(self.pixels[targets])
        difference = pooled_pixels(_images(self.pixels[nearest])) - pooled_pixels(truth)
        nearest = torch.where(difference.square().sum(1).sqrt() <= TWINS, targets, nearest)
        hits = {"exact": nearest == targets}
        hits |= {name: factor[nearest] == factor[targets] for name, factor in self.factors.items()}
        error = (images - truth).double().square().mean((1, 2, 3))
        psnr = -10 * (error / 4).clamp(min=1e-10).log10()
        return Scores(targets, nearest, {**hits, "training": self.trained[nearest]}, psnr)

    def _features_of(self, images: Tensor) -> Tensor:
        return self.features(images).float().cpu()

    def _nearest(self, features: Tensor) -> Tensor:
        return torch.cdist(features, self.bank).argmin(1)


def wilson(share: float, number: float) -> tuple[float, float]:
    """The 95% interval of a share of a number of independent samples (Wilson 1927)."""
    middle = share + _Z**2 / (2 * number)
    half = _Z * (share * (1 - share) / number + _Z**2 / (4 * number**2)) ** 0.5
    scale = 1 + _Z**2 / number
    return max(0.0, min(share, (middle - half) / scale)), min(1.0, max(share, (middle + half) / scale))


def _variance_of_mean(values: Tensor, groups: Tensor) -> float:
    """Of a mean of values [B], whose groups [B] are independent of each other, but not the values in one."""
    names, index = groups.unique(return_inverse=True)
    if len(names) < 2:
        return 0.0
    sums = values.new_zeros(len(names)).index_add(0, index, values - values.mean())
    return (sums.square().sum() / len(values) ** 2 * len(names) / (len(names) - 1)).item()


def _numbers(names: Sequence[str]) -> Tensor:
    """int64 [N], equal where the names are."""
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([order[name] for name in names], device="cpu")


def _images(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1
