"""The pictures in an npz, row by row: NumPy itself would read all of them at once."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

NAMES = ("images", "arr_0")  # ours, and what np.savez calls an array without a name
_LAYOUTS = "uint8 [N, H, W, C] or [N, C, H, W] of 1 or 3 channels, or [N, H, W]"


@dataclass(frozen=True)
class Array:
    """An array of pictures, of which only the header was read."""

    path: Path
    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return self.shape[0]

    def pictures(self) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        """uint8 [H, W, C], one after another. ValueError for a file that ends too early or was damaged."""
        size = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.name) as file:
                _header(file)
                for i in range(self.count):
                    content = file.read(size)
                    if len(content) < size:
                        raise ValueError(f"it ends within picture {i} of {self.count}")
                    yield _laid_out(np.frombuffer(content, np.uint8).reshape(self.shape[1:]))
        except Exception as error:  # damaged bytes raise nearly anything
            raise ValueError(f"cannot read the pictures in {self.path}: {error}") from error


def array_of(path: Path) -> Array:
    """The array of pictures in an npz. ValueError where there is none, or one of another dtype or shape."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [f"{name}.npy" for name in NAMES if f"{name}.npy" in archive.namelist()]
            if not names:
                raise ValueError(f"it has no array {' or '.join(NAMES)}; it has {', '.join(archive.namelist())}")
            with archive.open(names[0]) as file:
                shape, in_columns, dtype = _header(file)
    except Exception as error:  # damaged bytes raise nearly anything
        raise ValueError(f"cannot read {path}: {error}") from error
    pictures = len(shape) == 3 or (len(shape) == 4 and (shape[-1] in (1, 3) or shape[1] in (1, 3)))
    if dtype != np.uint8 or not pictures or 0 in shape[1:] or in_columns:
        told = ", its columns first" * in_columns
        raise ValueError(f"the pictures in {path} must be {_LAYOUTS}; got {dtype} {list(shape)}{told}")
    return Array(path, names[0], shape)


def _laid_out(picture: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[H, W, C] of any of the layouts."""
    if picture.ndim == 2:
        return picture[..., None]
    return picture if picture.shape[-1] in (1, 3) else picture.transpose(1, 2, 0)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype of the .npy that follows."""
    version = npy.read_magic(file)
    return npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
