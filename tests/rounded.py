"""What float32 arithmetic may be off by: a bound that is carried through an expression beside its exact value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = 2.0**-24  # float32's unit roundoff


@dataclass
class Rounded:
    """A value in float64, and how far the same expression in float32 can be from it.

    Running error analysis (Higham, Accuracy and Stability of Numerical Algorithms, second edition, section 3.3): each
    operation passes on the errors of what it reads, and rounds once. So the bound knows of every intermediate, however
    ill-conditioned, and holds for any input; values below float32's normal range aside. Plain numbers in an expression
    are exact.
    """

    value: Tensor
    error: Tensor

    @classmethod
    def number(cls, value: float) -> Rounded:
        """A coefficient, which float32 rounds once."""
        exact = torch.tensor(value, dtype=torch.float64)
        return cls(exact, (exact.float().double() - exact).abs() if math.isfinite(value) else torch.zeros_like(exact))

    @classmethod
    def exactly(cls, value: Tensor) -> Rounded:
        """What float32 holds."""
        return cls(value.double(), torch.zeros(value.shape, dtype=torch.float64))

    @staticmethod
    def _rounded(value: Tensor, error: Tensor, unit: float = UNIT) -> Rounded:
        return Rounded(value, error + unit * (value.abs() + error))

    def __add__(self, other: Rounded | float) -> Rounded:
        if not isinstance(other, Rounded):
            return self._rounded(self.value + other, self.error)
        return self._rounded(self.value + other.value, self.error + other.error)

    __radd__ = __add__

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error)

    def __rsub__(self, other: float) -> Rounded:
        return -self + other

    def __mul__(self, other: Rounded | float) -> Rounded:
        if not isinstance(other, Rounded):
            return self._rounded(self.value * other, self.error * abs(other))
        a, b = self, other
        error = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error
        return self._rounded(a.value * b.value, error)

    __rmul__ = __mul__

    def __truediv__(self, other: float) -> Rounded:
        return self * (1 / other)

    def exp(self, unit: float) -> Rounded:
        """By an exponential whose relative error is at most ``unit``."""
        value = self.value.exp()
        return self._rounded(value, value * self.error.expm1(), unit)

    def clamp(self, bound: Rounded) -> Rounded:
        """Between -bound and bound; no rounding, and the result is one or the other."""
        value = self.value.maximum(-bound.value).minimum(bound.value)
        return Rounded(value, self.error.maximum(bound.error))

    def view(self, *shape: int) -> Rounded:
        return Rounded(self.value.view(shape), self.error.view(shape))
