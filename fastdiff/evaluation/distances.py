"""Distances between two sets of pictures, of their features [N, D], computed in float64 on the features' device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.checks import check_finite, check_int, kind_of

NEIGHBOURS = 3  # of precision and recall, as their paper has it
_BLOCK = 512  # rows of a matrix of N × N at a time


@dataclass(frozen=True, eq=False)
class Moments:
    """What the Fréchet distance needs of n features: float64 mean [D], zero where n is 0, and R [at most D, D], where
    RᵀR = Σ (x − mean)(x − mean)ᵀ is n − 1 times the covariance.

    Two sets' moments join into those of both (Chan, Golub & LeVeque 1983), so that a set of any size is walked block by
    block. R takes the covariance's place because squaring would lose half of the digits of small variances.
    """

    n: int
    mean: Tensor
    root: Tensor

    @classmethod
    def none(cls, size: int) -> Moments:
        """Of no features of this size."""
        return cls(0, torch.zeros(size, dtype=torch.float64), torch.zeros(0, size, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features [N, D], N > 0."""
        mean = features.double().mean(0)
        return cls(len(features), mean, _triangle(features.double() - mean))

    def join(self, other: Moments) -> Moments:
        n = self.n + other.n
        if n == 0:
            return self
        apart = other.mean - self.mean
        between = (self.n * other.n / n) ** 0.5 * apart[None]
        return Moments(n, self.mean + apart * (other.n / n), _triangle(torch.cat((self.root, other.root, between))))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of features [N, D] and [M, D] (Dowson & Landau 1982; Heusel et al.
    2017).

    With Σ = RᵀR the trace of the root is the sum of the singular values of R_a R_bᵀ, which no rounding makes complex or
    negative, and which is as exact for fewer pictures than features. It is biased upwards, by more for fewer pictures:
    compare only values at equal N. Raises TypeError or ValueError, as the others do: for what is no matrix of finite
    features, for other numbers of features, for fewer than two pictures.
    """
    a, b = _features(a, b, at_least=2)
    return frechet_of_moments(Moments.of(a), Moments.of(b))


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """The same, of sets of which the moments are known, of at least two pictures each."""
    root_a, root_b = (each.root / (each.n - 1) ** 0.5 for each in (a, b))
    common = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (a.mean - b.mean).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * common
    return max(0.0, distance.item())  # of equal sets, rounding leaves some −1e-13 of the variance


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The squared maximum mean discrepancy under the kernel (x·y / D + 1)³, without bias, so that it may be negative
    (KID; Bińkowski et al. 2018). Features [N, D] and [M, D], all pairs of them rather than drawn subsets.
    """
    a, b = _features(a, b, at_least=2)
    n, m = len(a), len(b)
    within = _kernel_sum(a) / (n * (n - 1)) + _kernel_sum(b) / (m * (m - 1))
    return (within - 2 * _kernel_sum(a, b) / (n * m)).item()


def precision_recall(fake: Tensor, real: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """The share of fake pictures that lie among the real ones, and of real ones among the fake (Kynkäänniemi et al.
    2019).

    A picture lies among others if it is no further from one of them than that one's k-th nearest neighbour in its own
    set. Features [N, D] and [M, D]; both sets must be larger than k.
    """
    fake, real = _features(fake, real, at_least=check_int("k", k, 1, 1 << 20) + 1)
    return _covered(fake, real, k), _covered(real, fake, k)


@dataclass(frozen=True)
class Distances:
    """What is told of two sets of pictures, n fake ones and m real ones.

    drawn: how many of each kernel distance, precision and recall are of.
    """

    frechet: float
    kernel: float
    precision: float
    recall: float
    n: int
    m: int
    drawn: tuple[int, int]

    @classmethod
    def between(cls, fake: Tensor, real: Tensor) -> Distances:
        """Of features [N, D] and [M, D]."""
        fake, real = _features(fake, real, at_least=NEIGHBOURS + 1)
        return cls.of(Moments.of(fake), Moments.of(real), fake, real)

    @classmethod
    def of(cls, fake: Moments, real: Moments, fake_drawn: Tensor, real_drawn: Tensor) -> Distances:
        """Of two sets' moments, and of features that were drawn from each, [N, D] and [M, D]."""
        precision, recall = precision_recall(fake_drawn, real_drawn)
        kernel, drawn = kernel_distance(fake_drawn, real_drawn), (len(fake_drawn), len(real_drawn))
        return cls(frechet_of_moments(fake, real), kernel, precision, recall, fake.n, real.n, drawn)


def table(rows: dict[str, Distances]) -> str:
    """Distances as lines of text, a name each. KID is told times 1000."""
    width = max(map(len, rows))
    lines = [f"{'':{width}}  {'Fréchet':>9}  {'KID·10³':>9}  {'precision':>9}  {'recall':>9}  pictures"]
    for name, d in rows.items():
        numbers = f"{d.frechet:9.3f}  {1000 * d.kernel:9.3f}  {d.precision:9.3f}  {d.recall:9.3f}"
        drawn = f" ({d.drawn[0]}, {d.drawn[1]} drawn)" if d.drawn != (d.n, d.m) else ""
        lines.append(f"{name:{width}}  {numbers}  {d.n}, {d.m}{drawn}")
    if any(d.drawn != (d.n, d.m) for d in rows.values()):
        lines.append("The Fréchet distance is of all pictures; KID, precision and recall are of those drawn.")
    return "\n".join(lines)


def _features(a: Tensor, b: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    for features in (a, b):
        if not isinstance(features, Tensor):
            raise TypeError(f"features must be a tensor; got {kind_of(features)}")
        if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
            raise ValueError(f"features must be floating-point [N, D]; got {features.dtype} {list(features.shape)}")
        if len(features) < at_least:
            raise ValueError(f"there must be at least {at_least} pictures in each set; got {len(features)}")
        check_finite("features", features)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"both sets must have the same features; got {a.shape[1]} and {b.shape[1]}")
    return a.double(), b.double()


def _triangle(rows: Tensor) -> Tensor:
    """R [min(N, D), D] with the RᵀR of rows [N, D]."""
    found = torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows
    return found.contiguous()  # as it comes back from a file: BLAS rounds differently for another layout


def _blocks(a: Tensor) -> Iterator[tuple[int, Tensor]]:
    return ((start, a[start : start + _BLOCK]) for start in range(0, len(a), _BLOCK))


def _kernel_sum(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Over all pairs of two sets; of one set, over its pairs of two pictures."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for start, rows in _blocks(a):
        kernel = (rows @ (a if b is None else b).T / a.shape[1] + 1) ** 3
        total += kernel.sum() - (kernel.diagonal(start).sum() if b is None else 0)
    return total


def _covered(queries: Tensor, members: Tensor, k: int) -> float:
    """The share of `queries` that lie in a ball of `members`."""
    radii = []
    for start, rows in _blocks(members):
        distances = torch.cdist(rows, members)
        distances.diagonal(start).fill_(torch.inf)  # a picture is no neighbour of its own
        radii.append(distances.kthvalue(k, dim=1).values)
    radius = torch.cat(radii)
    inside = [(torch.cdist(rows, members) <= radius).any(1) for _, rows in _blocks(queries)]
    return torch.cat(inside).double().mean().item()
