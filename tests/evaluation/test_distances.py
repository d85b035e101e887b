"""Distances between sets of features: closed forms, scipy's square root, sets by hand, and what is refused."""

import math

import numpy as np
import pytest
import torch
from helpers import SEED

from fastdiff.evaluation import Distances, frechet_distance, kernel_distance, precision_recall
from fastdiff.evaluation import distances as module
from fastdiff.evaluation.distances import Moments, frechet_of_moments, table


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def with_moments(generator: torch.Generator, mean: torch.Tensor, root: torch.Tensor, n: int) -> torch.Tensor:
    """n features whose sample mean is `mean` and whose sample covariance is exactly root rootᵀ."""
    z = normal(generator, n, len(mean))
    z = z - z.mean(0)
    white = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / (n - 1))).T
    return mean + white @ root.T


# ---- Fréchet


def test_of_gaussians_whose_covariances_commute(generator: torch.Generator) -> None:
    """‖μ_a − μ_b‖² + ‖Σ_a^½ − Σ_b^½‖²_F where the two share their eigenvectors."""
    basis = torch.linalg.qr(normal(generator, 6, 6)).Q
    mean_a, mean_b = normal(generator, 6), normal(generator, 6)
    a, b = normal(generator, 6).abs(), normal(generator, 6).abs()
    found = frechet_distance(
        with_moments(generator, mean_a, basis * a, 50), with_moments(generator, mean_b, basis * b, 40)
    )
    expected = (mean_a - mean_b).square().sum() + (a - b).square().sum()
    assert found == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("n", [12, 200])
def test_against_scipy_s_square_root(generator: torch.Generator, n: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a = normal(generator, n, 20) @ normal(generator, 20, 20) + normal(generator, 20)
    b = normal(generator, n + 5, 20) @ normal(generator, 20, 20)
    covariances = [np.cov(features.numpy().T) for features in (a, b)]
    # A small multiple of the identity makes the singular covariance of 12 pictures one that scipy has a root of. By
    # concavity of the trace it moves the roots by at most √ε a dimension.
    ridge = 1e-10 if n < 20 else 0.0
    product = (covariances[0] + ridge * np.eye(20)) @ (covariances[1] + ridge * np.eye(20))
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + sum(map(np.trace, covariances))
    expected -= 2 * np.trace(linalg.sqrtm(product).real)
    largest = max(np.linalg.norm(c, 2) for c in covariances)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8, abs=4 * 20 * math.sqrt(ridge * largest))


@pytest.mark.parametrize("n", [5, 100])
def test_a_set_is_at_no_distance_from_itself_in_any_order(generator: torch.Generator, n: int) -> None:
    a = normal(generator, n, 16) * 10
    a[:, :3] = 0  # features that are always zero
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)
    shift = normal(generator, 16)
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_float32_features_are_computed_in_float64(generator: torch.Generator) -> None:
    a, b = normal(generator, 30, 8).float() + 1000, normal(generator, 30, 8).float() + 1000
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


def pieces(features: torch.Tensor, generator: torch.Generator) -> Moments:
    """The moments of a set, joined of blocks of any size, one and none among them."""
    found, start = Moments.none(features.shape[1]), 0
    while start < len(features):
        size = int(torch.randint(1, 30, (), generator=generator))
        found = found.join(Moments.of(features[start : start + size]))
        start += size
    return found


@pytest.mark.parametrize("n", [2, 9, 150])
def test_moments_of_blocks_are_those_of_all(generator: torch.Generator, n: int) -> None:
    features = normal(generator, n, 12) @ normal(generator, 12, 12) + 1e3 * normal(generator, 12)
    found = pieces(features, generator)
    mean, covariance = features.mean(0), np.cov(features.numpy().T)
    assert found.n == n
    torch.testing.assert_close(found.mean, mean, rtol=1e-13, atol=0)
    np.testing.assert_allclose((found.root.T @ found.root).numpy() / (n - 1), covariance, rtol=0, atol=1e-9)
    assert frechet_of_moments(found, Moments.of(features)) == pytest.approx(0, abs=1e-8)
    assert len(found.root) <= max(n + 30, 12)


@pytest.mark.parametrize("n", [30, 400])
def test_moments_of_blocks_against_scipy(generator: torch.Generator, n: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (
        normal(generator, n, 16) @ normal(generator, 16, 16),
        normal(generator, n, 16) @ normal(generator, 16, 16) + 1,
    )
    covariances = [np.cov(features.numpy().T) for features in (a, b)]
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + sum(map(np.trace, covariances))
    expected -= 2 * np.trace(linalg.sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_of_moments(pieces(a, generator), pieces(b, generator)) == pytest.approx(expected, rel=1e-8)


# ---- KID


def test_the_kernel_distance_is_the_published_sum(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4)  # blocks that divide nothing
    a, b = normal(generator, 9, 5), normal(generator, 7, 5) + 0.3

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return ((x @ y).item() / 5 + 1) ** 3

    within = [
        sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
        for s in (a, b)
    ]
    between = sum(kernel(x, y) for x in a for y in b) / 63
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-10, abs=1e-12)
    assert kernel_distance(a, a) == kernel_distance(a, a.clone())  # of two sets, though they are one tensor


def test_the_kernel_distance_has_no_bias() -> None:
    """Over 400 pairs of sets from one distribution its mean is zero, within five standard errors."""
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor([kernel_distance(*normal(generator, 2, 20, 4)) for _ in range(400)])
    assert abs(found.mean()) < 5 * found.std() / 20
    assert (found < 0).any()


# ---- precision and recall


def test_precision_and_recall_of_points_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 3)
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    fake = torch.tensor([[0.5], [1.5], [2.5], [30.0]])
    # Balls of the real ones, to the second neighbour: radius 2, 1, 2, 8, 9. Of the fake ones: 2, 1, 2, 28.5.
    assert precision_recall(fake, real, k=2) == (0.75, 1.0)
    # To the first: 1, 1, 1, 1, 1 and 1, 1, 1, 27.5: the last fake ball holds all but 0, 1 and 2, which others hold.
    assert precision_recall(fake, real, k=1) == (0.75, 1.0)
    assert precision_recall(fake[:3], real, k=1) == (1.0, 0.6)


def test_one_distribution_has_all_of_both_and_another_none(generator: torch.Generator) -> None:
    a = normal(generator, 600, 4)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a + 100, a) == (0.0, 0.0)
    precision, recall = precision_recall(a[:1] * 1e-3 + 1e-6 * normal(generator, 50, 4), a)
    assert (precision, recall < 0.1) == (1.0, True)  # one mode, well inside


# ---- together


def test_the_table_tells_each(generator: torch.Generator) -> None:
    a, b = normal(generator, 30, 4), normal(generator, 20, 4)
    found = Distances.between(a, b)
    assert (found.n, found.m) == (30, 20)
    assert (found.precision, found.recall) == precision_recall(a, b)
    head, line = table({"samples": found}).splitlines()
    assert head.split() == ["Fréchet", "KID·10³", "precision", "recall", "pictures"]
    assert line.split()[:3] == ["samples", f"{frechet_distance(a, b):.3f}", f"{1000 * kernel_distance(a, b):.3f}"]
    assert line.endswith("30, 20")
    *_, line, note = table({"samples": Distances.of(Moments.of(a), Moments.of(b), a[:9], b[:8])}).splitlines()
    assert line.endswith("30, 20 (9, 8 drawn)")
    assert note.startswith("The Fréchet distance is of all pictures")


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (np.zeros((4, 3)), "NumPy array"),
        (torch.zeros(4), "must be floating-point [N, D]; got torch.float32 [4]"),
        (torch.zeros(4, 3, dtype=torch.int64), "int64"),
        (torch.zeros(4, 0), "[4, 0]"),
        (torch.zeros(1, 3), "at least"),
        (torch.full((4, 3), torch.nan), "finite"),
        (torch.zeros(4, 2), "the same features; got 2 and 3"),
    ],
)
@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, precision_recall])
def test_what_is_no_features_is_refused(function, a, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        function(a, torch.zeros(4, 3))
    assert message in str(error.value)


def test_precision_and_recall_need_more_pictures_than_neighbours() -> None:
    with pytest.raises(ValueError, match="at least 4 pictures in each set; got 3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
