"""Picture files as tensors of bytes."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Pillow's names of the formats that hold pictures. It knows others by name that it only writes (PDF), that it starts
# another program for (EPS), or that hold no picture it could read (HDF5, MPEG).
_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO",
    "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip


def names_picture(name: str) -> bool:
    """Whether a file of this name is a picture; hidden files are not."""
    path = PurePath(name)
    return Image.registered_extensions().get(path.suffix.lower()) in _FORMATS and not path.name.startswith(".")


def is_picture(path: Path) -> bool:
    """Whether a file is there whose name is that of a picture."""
    return names_picture(path.name) and path.is_file()


def read_picture(file: str | os.PathLike[str] | Image.Image, size: tuple[int, int], *, grey: bool = False) -> Tensor:
    """One picture as uint8 [1 or 3, H, W], size being (H, W): turned upright, cropped around its centre, resized.

    file: its path, or the picture itself as Pillow has it. Grey stays one channel; 16 bits of it become 8. What is
    transparent becomes white. grey: make any picture grey.
    Raises ValueError that names the file where it cannot be read.
    """
    height, width = size
    try:
        with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            # A PNG of 16-bit grey has the mode I in some versions of Pillow. Without this its pixels would be clipped.
            if picture.mode.startswith("I;16") or (picture.mode == "I" and opened.format == "PNG"):
                picture = Image.fromarray((np.asarray(picture).astype(np.float64) / 257).round().astype(np.uint8))
            elif picture.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are neither 8 nor 16 bits (Pillow's mode {picture.mode})")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            grey = grey or opened.mode in ("1", "L", "LA", "La") or opened.mode.startswith("I")
            picture = ImageOps.fit(picture.convert("L" if grey else "RGB"), (width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise ValueError(f"cannot read the picture {file}: {error}") from error
    return torch.from_numpy(np.array(picture)).reshape(height, width, -1).permute(2, 0, 1).contiguous()
