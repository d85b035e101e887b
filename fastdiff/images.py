"""Images out of tensors: [-1, 1] to bytes, grids to look at and as PNG, trajectories as GIF."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image

from fastdiff.checks import check_number
from fastdiff.files import atomic_write, check_writable
from fastdiff.pictures.embedded import Layout, png_info, sha256_of, text_of
from fastdiff.pictures.grid import make_grid, resolve_layout, to_uint8, with_names
from fastdiff.pictures.recipe import Recipe
from fastdiff.sampling.state import State

__all__ = ["check_writable", "make_grid", "save_gif", "save_grid", "show", "to_uint8"]


def show(images: torch.Tensor, *, columns: int | None = None, scale: int | None = None, gap: int = 1) -> Image.Image:
    """A batch in [-1, 1] as one picture (see ``make_grid``): a notebook displays it, ``.show()`` opens a window."""
    return make_grid(images, columns=columns, scale=scale, gap=gap)


def save_grid(
    path: str | os.PathLike[str],
    images: torch.Tensor,
    *,
    columns: int | None = None,
    scale: int | None = None,
    gap: int = 1,
    names: Sequence[str] = (),
    recipe: Recipe | None = None,
) -> Path:
    """Write a batch as one PNG (see `make_grid`); the file appears whole or not at all. Returns its path.

    names: one a row, to stand beside it.
    recipe: how the images were made (``fastdiff.Recipe.of``), to be kept in the file as text, so that
        ``fastdiff.reproduce`` can make them again.
    """
    path = check_writable(path, suffix=".png")
    picture, margin = make_grid(images, columns=columns, scale=scale, gap=gap), 0
    if names:
        margin = -picture.width
        picture = with_names(picture, names)
        margin += picture.width
    about: dict[str, Any] = {}
    if recipe is not None:
        _check_recipe(recipe, images.shape)
        digest = hashlib.sha256()
        sha256_of(images, digest)
        about["pnginfo"] = png_info(text_of(recipe, _layout(images.shape, columns, scale, gap, digest, margin=margin)))
    with atomic_write(path) as file:
        picture.save(file, format="PNG", **about)
    return path


def save_gif(
    path: str | os.PathLike[str],
    frames: Iterable[torch.Tensor | State],
    *,
    duration: float = 0.06,
    hold: float = 1.0,
    columns: int | None = None,
    scale: int | None = None,
    gap: int = 1,
    recipe: Recipe | None = None,
) -> Path:
    """Write batches [B, C, H, W], all of one shape, as the frames of a GIF that loops; whole or not at all.

    frames: the batches, or the states that `sample_iter` yields, of which x is shown.
    duration: seconds a frame; hold: seconds for the last one. GIF counts in hundredths. Returns the path.
    recipe: as in `save_grid`; the frames are then states (``recipe.states``), which know their rows.
    """
    path = check_writable(path, suffix=".gif")
    duration, hold = check_number("duration", duration, 0.01, 655), check_number("hold", hold, 0.01, 655)
    if not isinstance(frames, Iterable):
        raise TypeError(f"frames must be batches of images, one after another; got {type(frames).__name__}")
    pictures: list[Image.Image] = []
    rows: list[int] = []
    digest = hashlib.sha256()
    shape: Sequence[int] = ()
    for frame in frames:  # of each only its picture is kept
        images = frame.x if isinstance(frame, State) else frame
        pictures.append(make_grid(images, columns=columns, scale=scale, gap=gap))
        if not shape:
            shape = images.shape
        if images.shape != shape:
            raise ValueError("frames must all have one shape")
        if isinstance(frame, State):
            rows.append(frame.row)
        if recipe is not None:
            sha256_of(images, digest)
    if not pictures:
        raise ValueError("frames must hold at least one batch of images")
    comment = None
    if recipe is not None:
        _check_recipe(recipe, shape)
        if len(rows) != len(pictures):
            raise TypeError("frames beside a recipe must be states of sample_iter, whose rows are kept with it")
        told = {"rows": rows, "duration": duration, "hold": hold}
        comment = text_of(recipe, _layout(shape, columns, scale, gap, digest, **told)).encode()
    with atomic_write(path) as file:
        write_gif(file, pictures, duration, hold, comment)
    return path


def write_gif(
    file: BinaryIO, pictures: Sequence[Image.Image], duration: float, hold: float, comment: bytes | None = None
) -> None:
    """Write a GIF to an open file; seconds as in `save_gif`."""
    milliseconds = [round(duration * 1000)] * (len(pictures) - 1) + [round(hold * 1000)]
    first, *rest = pictures
    about = {} if comment is None else {"comment": comment}
    first.save(file, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0, **about)


def _check_recipe(recipe: Any, shape: Sequence[int]) -> None:
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a fastdiff.Recipe; got {type(recipe).__name__}")
    if list(shape) != recipe.shape:
        raise ValueError(f"recipe is of images {recipe.shape}; got {list(shape)}")


def _layout(shape: Sequence[int], columns: int | None, scale: int | None, gap: int, digest: Any, **more: Any) -> Layout:
    columns, scale, gap = resolve_layout(shape, columns, scale, gap)
    return Layout(columns=columns, scale=scale, gap=gap, sha256=digest.hexdigest(), **more)
