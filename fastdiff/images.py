"""Images in and out of tensors: [-1, 1] to bytes, grids as PNG, trajectories as GIF."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from fastdiff.checks import check_int, check_number
from fastdiff.files import atomic_write, check_writable

__all__ = ["check_writable", "make_grid", "save_gif", "save_grid", "to_uint8"]

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
    batch, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(batch)) if columns is None else columns
    scale = max(1, VISIBLE // min(height, width)) if scale is None else scale
    columns = min(check_int("columns", columns, 1, 1 << 62), batch)
    scale, gap = check_int("scale", scale, 1, 1 << 16), check_int("gap", gap, 0, 1 << 16)
    rows = math.ceil(batch / columns)
    cell_height, cell_width = height + gap, width + gap
    size = (channels, rows * cell_height - gap, columns * cell_width - gap)
    grid = torch.full(size, 128, dtype=torch.uint8, device="cpu")
    for index, image in enumerate(to_uint8(images).cpu()):
        top, left = index // columns * cell_height, index % columns * cell_width
        grid[:, top : top + height, left : left + width] = image

    pixels = grid.permute(1, 2, 0).numpy()  # [rows, columns, C]
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_grid(
    path: str | os.PathLike[str],
    images: torch.Tensor,
    *,
    columns: int | None = None,
    scale: int | None = None,
    gap: int = 1,
) -> Path:
    """Write a batch as one PNG (see `make_grid`); the file appears whole or not at all. Returns its path."""
    path = check_writable(path, suffix=".png")
    picture = make_grid(images, columns=columns, scale=scale, gap=gap)
    with atomic_write(path) as file:
        picture.save(file, format="PNG")
    return path


def save_gif(
    path: str | os.PathLike[str],
    frames: Iterable[torch.Tensor],
    *,
    duration: float = 0.06,
    hold: float = 1.0,
    columns: int | None = None,
    scale: int | None = None,
    gap: int = 1,
) -> Path:
    """Write batches [B, C, H, W], all of one shape, as the frames of a GIF that loops; whole or not at all.

    duration: seconds a frame; hold: seconds for the last one. GIF counts in hundredths. Returns the path.
    """
    path = check_writable(path, suffix=".gif")
    duration, hold = check_number("duration", duration, 0.01, 655), check_number("hold", hold, 0.01, 655)
    if not isinstance(frames, Iterable):
        raise TypeError(f"frames must be batches of images, one after another; got {type(frames).__name__}")
    pictures = [make_grid(frame, columns=columns, scale=scale, gap=gap) for frame in frames]
    if not pictures:
        raise ValueError("frames must hold at least one batch of images")
    if any(picture.size != pictures[0].size or picture.mode != pictures[0].mode for picture in pictures):
        raise ValueError("frames must all have one shape")
    milliseconds = [round(duration * 1000)] * (len(pictures) - 1) + [round(hold * 1000)]
    with atomic_write(path) as file:
        first, *rest = pictures
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return path
