"""Where a convolution's windows lie: stride, padding, dilation, groups, and whether the image is doubled first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.checks import check_int

MOST = (1 << 31) - 1


class Geometry(NamedTuple):
    """Of the image, which is doubled by its nearest neighbours where ``upsample``: pairs are (rows, columns)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))  # (top, bottom), (left, right)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    upsample: bool = False

    @property
    def symmetric(self) -> tuple[int, int] | None:
        """(rows, columns) of zeros on each side, or None where two sides differ."""
        (top, bottom), (left, right) = self.padding
        return (top, left) if top == bottom and left == right else None

    @property
    def square(self) -> bool:
        """Whether rows are treated as columns are, without dilation and groups."""
        same = self.stride[0] == self.stride[1] and self.padding[0] == self.padding[1]
        return same and self.dilation == (1, 1) and self.groups == 1

    def size(self, image: Tensor, weight: Tensor) -> tuple[int, int]:
        """The result's height and width."""
        rows, columns = (
            ((2 if self.upsample else 1) * image.shape[2 + i] + sum(self.padding[i])
             - self.dilation[i] * (weight.shape[2 + i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )  # fmt: skip
        return rows, columns


def geometry_of(stride: Any, padding: Any, dilation: Any, groups: Any, upsample: Any) -> Geometry:
    """The checked form of ``conv2d``'s arguments; TypeError or ValueError that names the one that is wrong."""
    if not isinstance(upsample, bool):
        raise TypeError(f"upsample must be a bool; got {type(upsample).__name__}")
    return Geometry(
        _pair("stride", stride, 1),
        _sides(padding),
        _pair("dilation", dilation, 1),
        check_int("groups", groups, 1, MOST),
        upsample,
    )


def _pair(name: str, value: Any, low: int) -> tuple[int, int]:
    if not isinstance(value, Sequence):
        number = check_int(name, value, low, MOST)
        return number, number
    if isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} must be an int or a pair of them; got {value!r}")
    return check_int(f"{name}[0]", value[0], low, MOST), check_int(f"{name}[1]", value[1], low, MOST)


def _sides(padding: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    if isinstance(padding, str):
        raise ValueError(f"padding must be an int, (rows, columns) or ((top, bottom), (left, right)); got {padding!r}")
    if isinstance(padding, Sequence) and len(padding) == 2 and any(isinstance(side, Sequence) for side in padding):
        return _pair("padding[0]", padding[0], 0), _pair("padding[1]", padding[1], 0)
    rows, columns = _pair("padding", padding, 0)
    return (rows, rows), (columns, columns)
