"""A batch of images as one picture: [-1, 1] to bytes, in rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from fastdiff.checks import check_int

VISIBLE = 64  # pixels: images with a smaller side are enlarged by a whole factor to come near it


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Bytes 0 … 255 for values -1 … 1: clamped, rounded to nearest, any shape, on the same device.

    Raises TypeError for a tensor that is not floating-point and ValueError for NaN, which has no colour.
    """
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor; got {got}")
    if images.layout != torch.strided or images.is_meta:
        raise TypeError(f"images must be a dense tensor with numbers in it; got {images.layout} on {images.device}")
    if bool(images.isnan().any()):
        raise ValueError("images must not hold NaN")
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def make_grid(
    images: torch.Tensor, *, columns: int | None = None, scale: int | None = None, gap: int = 1
) -> Image.Image:
    """One picture of a batch, in rows of `columns` images with `gap` pixels (before enlarging) between them.

    images: [B, C, H, W] in [-1, 1], C = 1 (grey) or 3 (RGB), B >= 1. columns: ⌈√B⌉ unless given.
    scale: whole factor of enlargement, nearest neighbour; unless given, what brings the side near 64 pixels.
    """
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.numel() == 0 or images.shape[1] not in (1, 3):
        got = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images must be a non-empty tensor [B, 1 or 3, H, W]; got {got}")
    channels, height, width = images.shape[1:]
    columns, scale, gap = resolve_layout(images.shape, columns, scale, gap)
    cell_height, cell_width = height + gap, width + gap
    wide, high = (side // scale for side in picture_size(images.shape, columns, scale, gap))
    grid = torch.full((channels, high, wide), 128, dtype=torch.uint8, device="cpu")
    for index, image in enumerate(to_uint8(images).cpu()):
        top, left = index // columns * cell_height, index % columns * cell_width
        grid[:, top : top + height, left : left + width] = image

    pixels = grid.permute(1, 2, 0).numpy()  # [rows, columns, C]
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def with_names(picture: Image.Image, names: Sequence[str]) -> Image.Image:
    """A grid with a name to the left of each of its rows.

    Names may have several lines; what is longer than 24 characters a line is cut.
    """
    font = ImageFont.load_default()
    # A font without Unicode has no glyph for such a name, and says so with an error.
    shown = [name if hasattr(font, "path") else name.encode("latin-1", "replace").decode("latin-1") for name in names]
    shown = ["\n".join(n if len(n) <= 24 else f"{n[:21]}..." for n in name.split("\n")) for name in shown]
    margin = 8 + max(int(font.getlength(line)) for name in shown for line in name.split("\n"))
    height = picture.height / len(names)
    wide = Image.new(picture.mode, (picture.width + margin, picture.height), "white")
    wide.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(wide)
    for row, name in enumerate(shown):
        top = row * height + (height - (draw.multiline_textbbox((0, 0), name, font=font)[3] if name else 0)) / 2
        draw.text((4, top), name, fill="black", font=font)
    return wide


def resolve_layout(shape: Sequence[int], columns: int | None, scale: int | None, gap: int) -> tuple[int, int, int]:
    """``make_grid``'s columns, scale and gap for a batch of this shape, checked, its own where they are None."""
    batch, _, height, width = shape
    columns = math.ceil(math.sqrt(batch)) if columns is None else columns
    scale = max(1, VISIBLE // min(height, width)) if scale is None else scale
    columns = min(check_int("columns", columns, 1, 1 << 62), batch)
    return columns, check_int("scale", scale, 1, 1 << 16), check_int("gap", gap, 0, 1 << 16)


def picture_size(shape: Sequence[int], columns: int, scale: int, gap: int) -> tuple[int, int]:
    """Width and height of a grid in pixels."""
    batch, _, height, width = shape
    rows = math.ceil(batch / columns)
    return (columns * (width + gap) - gap) * scale, (rows * (height + gap) - gap) * scale
