"""A recipe as text in a picture: PNG's compressed text, a GIF's comment."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastdiff.files import parse_json
from fastdiff.pictures.recipe import FORMAT, MOST, Recipe, from_object
from fastdiff.pictures.values import as_bytes

KEY = "fastdiff"
PART = 1_000_000  # characters of one text of a PNG: Pillow refuses to open a picture with one of 2²⁰ or more

Count = Annotated[int, Meta(ge=0, le=1 << 24)]


class Layout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How a picture shows images, so that it can be made again of them.

    Attributes:
        columns, scale, gap: of the grid, as ``make_grid`` has them.
        sha256: of the images, float32 in row-major order, before they become bytes; of a film all frames' one by one.
        rows: of a film, the ``State.row`` of each frame; None for a grid.
        duration, hold: seconds a frame, and of the last one.
        index: of a picture that shows one image of the recipe's batch: which.
        margin: pixels to the left of the grid, where the names of its rows stand.
    """

    columns: Annotated[int, Meta(ge=1, le=1 << 24)]
    scale: Annotated[int, Meta(ge=1, le=1 << 16)]
    gap: Annotated[int, Meta(ge=0, le=1 << 16)]
    sha256: str
    rows: list[Count] | None = None
    duration: float = 0.0
    hold: float = 0.0
    index: Count | None = None
    margin: Annotated[int, Meta(ge=0, le=1 << 16)] = 0


def text_of(recipe: Recipe, layout: Layout) -> str:
    """What stands in the picture. ValueError where it is too long."""
    return recipe.to_json(picture=msgspec.to_builtins(layout))


def png_info(text: str) -> PngInfo:
    """The text as compressed texts of a PNG: "fastdiff" and, of a long one, "fastdiff-1", and so on."""
    info = PngInfo()
    for i in range(0, len(text), PART):
        info.add_text(f"{KEY}-{i // PART}" if i else KEY, text[i : i + PART], zip=True)
    return info


def packed(recipe: Recipe) -> list[bytes]:
    """The compressed texts of a recipe that many pictures share, to be made once for `png_info_of`."""
    text = recipe.to_json()[1:]
    return [zlib.compress(text[i : i + PART].encode()) for i in range(0, len(text), PART)]


def png_info_of(layout: Layout, shared: list[bytes]) -> PngInfo:
    """A picture's layout, and the recipe that it shares with others, as `read` understands them."""
    info = PngInfo()
    info.add_text(KEY, f'{{"picture":{msgspec.json.encode(layout).decode()},')
    for i, part in enumerate(shared, 1):
        info.add(b"zTXt", f"{KEY}-{i}".encode() + b"\0\0" + part)
    return info


def read(path: str | os.PathLike[str]) -> tuple[Recipe, Layout]:
    """The recipe in a PNG or GIF, and how the picture shows the images.

    Nothing in it is run; it is data whose types and sizes are checked. Raises OSError, or ValueError that names the
    file and says what is wrong: it is no such picture, has no recipe, or one that is damaged.
    """
    path = Path(path)
    with open_picture(path) as picture:
        text = _text(picture)
    if text is None:
        raise ValueError(f"{path} has no recipe in it: fastdiff sample and save_grid(…, recipe=…) write one")
    try:
        if len(text) > MOST:
            raise ValueError(f"it has more than {MOST:,} characters")
        content = parse_json(text, infinities=True)
        if not isinstance(content, dict) or "picture" not in content:
            raise ValueError(f"it must be an object of format {FORMAT!r} with a picture")
        layout, recipe = msgspec.convert(content.pop("picture"), Layout), from_object(content)
        if layout.index is not None and layout.index >= recipe.shape[0]:
            raise ValueError(f"it shows image {layout.index} of {recipe.shape[0]}")
        return recipe, layout
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has a recipe that cannot be read: {error}") from None


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a PNG or GIF, to look at, or to make the images with another network; raises as ``read`` does."""
    return read(path)[0]


def open_picture(path: Path) -> Image.Image:
    """The opened picture, not yet unpacked; ValueError naming the file for what is no PNG and no GIF."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, no picture")
    try:
        picture = Image.open(path, formats=("PNG", "GIF"))
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # the file's own: it is missing, say
            raise
        raise ValueError(f"{path} is no PNG or GIF that can be read: {error}") from None
    return picture


def _text(picture: Image.Image) -> str | None:
    if picture.format == "GIF":
        comment: Any = picture.info.get("comment", b"")
        text = comment.decode("latin-1") if isinstance(comment, bytes) else str(comment)
        return text if text.startswith('{"format"') else None
    texts = picture.info  # what stands before the pixels, where Pillow writes it
    if KEY not in texts:
        picture.load()  # other programs may move it behind them
        texts = picture.info
    parts = [texts.get(KEY)]
    while (following := texts.get(f"{KEY}-{len(parts)}")) is not None:
        parts.append(following)
    return None if parts[0] is None else "".join(map(str, parts))


def sha256_of(images: Tensor, digest: Any) -> None:
    """Add a batch's numbers, as float32 in row-major order, to a digest of hashlib."""
    digest.update(as_bytes(images.detach().to(device="cpu", dtype=torch.float32)))
