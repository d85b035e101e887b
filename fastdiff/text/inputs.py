"""Pictures and masks that a call is given: files, Pillow's images or tensors, as tensors of one size."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import all_finite, check_int, kind_of


def resolve_size(size: Any, default: int | None, factor: int, *tensors: Any) -> tuple[int, int]:
    """(H, W) in pixels: what was asked for, or that of a tensor among the pictures, or else the model's own.

    Raises ValueError for one that is no multiple of ``factor``, the pixels of a latent.
    """
    given = [one for t in tensors for one in (t if isinstance(t, (list, tuple)) else [t])]
    found = [tuple(t.shape[-2:]) for t in given if isinstance(t, Tensor) and t.ndim >= 2]
    if size is None and not found and default is None:
        raise ValueError("size must be given: the model's config has no sample_size")
    chosen = size if size is not None else found[0] if found else default
    pair = chosen if isinstance(chosen, (tuple, list)) else (chosen, chosen)
    if len(pair) != 2:
        raise ValueError(f"size must be a number of pixels, or (height, width); got {size!r}")
    height, width = (check_int("size", side, factor, 1 << 16) for side in pair)
    if height % factor or width % factor:
        raise ValueError(f"size must be a multiple of {factor}, the pixels of a latent; got {height}×{width}")
    return height, width


def picture(name: str, given: Any, size: tuple[int, int]) -> Tensor:
    """float32 [B, 3, H, W] in [-1, 1] of a path, a Pillow image, a tensor [3, H, W] or [B, 3, H, W], or a list of them.

    Files and Pillow's images are turned upright, cropped around the centre and resized; tensors must have the size.
    """
    if isinstance(given, (list, tuple)):
        if not given:
            raise ValueError(f"{name} must hold at least one picture")
        return torch.cat([picture(f"{name}[{i}]", one, size) for i, one in enumerate(given)])
    if not isinstance(given, Tensor):
        return _pixels(name, given, size, grey=False) * 2 - 1
    if not given.is_floating_point():
        raise TypeError(f"{name} must be floating-point in [-1, 1], such as bytes / 127.5 - 1; got {given.dtype}")
    wide = given[None] if given.ndim == 3 else given
    if wide.ndim != 4 or wide.shape[1] != 3 or tuple(wide.shape[2:]) != size:
        raise ValueError(f"{name} must be [3, {size[0]}, {size[1]}] or a batch of such; got {list(given.shape)}")
    return _within(name, wide.detach().to(torch.float32), -1)


def mask_of(given: Any, size: tuple[int, int]) -> Tensor:
    """bool [B, 1, H, W], True where a picture is kept: where a file or Pillow's image is white.

    Tensors are bool, or numbers in [0, 1] of which 0.5 and more is kept: [H, W], [1, H, W] or [B, 1, H, W].
    """
    if not isinstance(given, Tensor):
        return _pixels("mask", given, size, grey=True) >= 0.5
    if given.dtype != torch.bool and not given.is_floating_point():
        raise TypeError(f"mask must be bool, or numbers in [0, 1]; got {given.dtype}")
    wide = given[(None,) * max(0, 4 - given.ndim)]
    if wide.ndim != 4 or wide.shape[1] != 1 or tuple(wide.shape[2:]) != size:
        raise ValueError(f"mask must match the picture: [{size[0]}, {size[1]}]; got {list(given.shape)}")
    return _within("mask", wide.detach().to(torch.float32), 0) >= 0.5


def spread(name: str, given: Tensor, prompts: int, count: int) -> Tensor:
    """A batch of one entry, one a prompt, or one an image, as one an image."""
    if len(given) not in (1, prompts, count):
        raise ValueError(f"{name} must be one, {prompts} (one a prompt) or {count} (one an image); got {len(given)}")
    return given.expand(count, -1, -1, -1) if len(given) == 1 else given.repeat_interleave(count // len(given), 0)


def _within(name: str, numbers: Tensor, low: int) -> Tensor:
    if not all_finite(numbers) or (numbers.numel() and not low <= numbers.min() <= numbers.max() <= 1):
        raise ValueError(f"{name} must lie in [{low}, 1]; got [{numbers.min():g}, {numbers.max():g}]")
    return numbers


def _pixels(name: str, given: Any, size: tuple[int, int], *, grey: bool) -> Tensor:
    """float32 [1, 1 or 3, H, W] in [0, 1] of a file or a Pillow image."""
    from PIL import Image

    from fastdiff.training.pictures import read_picture

    if not isinstance(given, (str, os.PathLike, Image.Image)):
        raise TypeError(f"{name} must be a path, a Pillow image or a tensor; got {kind_of(given)}")
    return read_picture(given, size, grey=grey).float().expand(1 if grey else 3, -1, -1)[None] / 255
