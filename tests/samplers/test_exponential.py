"""The integrals of exponential integrators, against rational numbers."""

import itertools
import math
from fractions import Fraction

import pytest

from fastdiff.samplers.exponential import moments, phi, weights


def exact_phi(k, z):
    """Σ z^j/(j + k)! in rational numbers."""
    z, total, term = Fraction(z), Fraction(0), Fraction(1, math.factorial(k))
    for j in range(1, 130):
        total += term
        term *= z / (j + k)
    return float(total)


def test_phi(rng):
    numbers = [0.0, 2.0**-40, -(2.0**-30), 1 - 2.0**-20, 1.0, -1.0, 20.0, -30.0]
    for z in [*numbers, *(rng.randrange(-512, 512) / 64 for _ in range(40))]:
        for k in (1, 2, 3, 4):
            assert phi(k, z) == pytest.approx(exact_phi(k, z), rel=1e-13), (k, z)


def test_weights_integrate_polynomials(rng):
    """Σ w_j f(τ_j) = ∫ z e^{(1−τ)z} f(τ) dτ for every f of degree below the number of outputs; short steps too."""
    for z, count in itertools.product((-7.0, -0.3, 1e-6, 0.8, 5.0), (0, 1, 2, 3)):
        nodes = [-rng.uniform(0.3, 0.9) - i for i in range(count)]
        found = weights(nodes, moments(z, count))
        for degree in range(count + 1):
            total = sum(w * tau**degree for w, tau in zip(found, [0.0, *nodes], strict=True))
            exact = z * math.factorial(degree) * exact_phi(degree + 1, z)
            size = sum(abs(w * tau**degree) for w, tau in zip(found, [0.0, *nodes], strict=True))
            assert total == pytest.approx(exact, rel=1e-12, abs=1e-13 * size)
