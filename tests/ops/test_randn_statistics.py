"""The noise stream's statistics over ten million draws. The seeds are fixed, so the tests are too."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastdiff

N = 10**7
Z = 5.0  # a bound that a fair generator passes but for six times in ten million
KEYS = [{"seed": 0}, {"seed": (1 << 63) + 5, "sample_offset": (1 << 32) - 1, "draw": 999, "stream": 1}]

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def native() -> None:
    pytest.importorskip("fastdiff._C", reason="the extension is not built; the reference would take minutes")


def draws(n: int = N, **key: int) -> Tensor:
    return fastdiff.randn((1, n), backend="native", **key)[0].double()


@pytest.mark.parametrize("key", KEYS)
def test_moments(key):
    z = draws(**key)
    power = torch.ones_like(z)
    # E z^k, and the variance of z^k, E z^2k - (E z^k)^2, of a normal.
    for k, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10170)], start=1):
        power *= z
        score = (float(power.mean()) - mean) / math.sqrt(variance / N)
        assert abs(score) < Z, f"moment {k} is {score:.1f} standard errors away"


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_kolmogorov_smirnov(key):
    stats = pytest.importorskip("scipy.stats")
    p = torch.special.ndtr(draws(**key).sort().values)
    rank = torch.arange(N + 1, dtype=torch.float64) / N
    distance = max(float((rank[1:] - p).max()), float((p - rank[:-1]).max()))
    assert stats.kstwobign.sf(distance * math.sqrt(N)) > 1e-4


@pytest.mark.slow
def test_kolmogorov_smirnov_of_short_samples():
    """One image of each of 4000 seeds, samples, draws: the p-values must themselves be uniform."""
    stats = pytest.importorskip("scipy.stats")
    names = ("seed", "sample_offset", "draw")
    values = [stats.kstest(draws(3072, **{name: k}).numpy(), "norm").pvalue for name in names for k in range(400)]
    assert stats.kstest(values, "uniform").pvalue > 1e-4


def test_the_tails():
    """How many of 10^7 lie beyond 3, 4, 5 and the largest |z|, against the normal's."""
    z = draws(seed=12).abs()
    for bound in (3.0, 4.0, 5.0):
        p = math.erfc(bound / math.sqrt(2))
        assert abs(int((z > bound).sum()) - N * p) < Z * math.sqrt(N * p) + 1
    assert 4.5 < float(z.max()) < 6.77


def score(a: Tensor, b: Tensor) -> float:
    """Correlation in standard errors, for zero mean and unit variance."""
    return float((a * b).mean()) * math.sqrt(len(a))


def assert_uncorrelated(a: Tensor, b: Tensor, what: str) -> None:
    assert abs(score(a, b)) < Z, what
    # Magnitudes: (z^2 - 1)/sqrt 2 has mean 0 and variance 1.
    size_a, size_b = ((v.square() - 1) / math.sqrt(2) for v in (a, b))
    assert abs(score(size_a, size_b)) < Z, f"magnitudes of {what}"


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 64, 3072])
def test_neighbouring_elements_are_uncorrelated(lag):
    z = draws(10**7 // 4, seed=21)
    assert_uncorrelated(z[lag:], z[:-lag], f"elements {lag} apart")


@pytest.mark.parametrize("name", ["sample_offset", "draw", "stream", "seed"])
def test_neighbouring_counters_are_uncorrelated(name):
    numbers = [0, 1, 2, 3, 1 << 16, (1 << 32) - 1] + ([1 << 32, 1 << 63] if name == "seed" else [])
    blocks = {number: draws(10**6, **{name: number}) for number in numbers}
    for a, b in itertools.combinations(numbers, 2):
        assert_uncorrelated(blocks[a], blocks[b], f"{name} {a} and {b}")


def test_swapped_addresses_are_uncorrelated():
    """(sample 1, draw 2) is not (sample 2, draw 1), nor a seed's number another one's."""
    blocks = [
        draws(10**6, seed=s, sample_offset=n, draw=d, stream=k) for s, n, d, k in set(itertools.permutations(range(4)))
    ]
    for a, b in itertools.combinations(blocks, 2):
        assert abs(score(a, b)) < Z


def test_pairs_fill_the_plane_evenly():
    """Box-Muller's pairs: radius and angle independent and of the right laws, by chi-squared over 32 x 32 cells."""
    stats = pytest.importorskip("scipy.stats")
    pairs = draws(seed=5).view(-1, 2)
    radius = 1 - (-pairs.square().sum(1) / 2).exp()
    angle = torch.atan2(pairs[:, 1], pairs[:, 0]) / (2 * math.pi) + 0.5
    cells = (radius * 32).long().clamp(0, 31) * 32 + (angle * 32).long().clamp(0, 31)
    assert stats.chisquare(torch.bincount(cells, minlength=1024).numpy()).pvalue > 1e-4
