"""Training images: scikit-learn's handwritten digits, or a folder of pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Sampler

DIGITS_SIZE = 8  # pixels a side
HELD_OUT_DIGITS = 500  # of 1797; never trained on
FOLDER_SIZE = 32  # pixels a side, unless asked otherwise

# Pillow's names of the formats that hold pictures. It knows others by name that it only writes (PDF), that it starts
# another program for (EPS), or that hold no picture it could read (HDF5, MPEG).
_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO",
    "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled or unlabelled images of one size, held in memory as bytes.

    pixels: uint8 [N, C, H, W] from 0 to `white`. labels: int64 [N], indices into `classes`; None where there are none.
    """

    pixels: torch.Tensor
    labels: torch.Tensor | None
    classes: tuple[str, ...]
    white: int = 255

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def images(self, index: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """The chosen images (all of them by default), float32 [n, C, H, W] in [-1, 1]."""
        return self.pixels[index].float() * (2 / self.white) - 1

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A batch for a DataLoader: the images of an int64 index [n], and their labels [n] where there are any."""
        return self.images(index), None if self.labels is None else self.labels[index]


class Draws(Sampler[torch.Tensor]):
    """The indices of one batch after another without end, drawn with replacement.

    They come from the generator when they are asked for, never ahead, so that its state is all that a checkpoint needs
    to keep. (torch's RandomSampler draws 32 ahead.)
    """

    def __init__(self, size: int, batch_size: int, generator: torch.Generator) -> None:
        self.size, self.batch_size, self.generator = size, batch_size, generator

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.randint(self.size, (self.batch_size,), generator=self.generator, device="cpu")


def load(data: str | os.PathLike[str], *, size: int | None = None) -> ImageData:
    """The training images that `data` names: "digits" (their training part), or a folder.

    A folder that is itself named digits is written ./digits.
    size: pixels a side; digits are 8 × 8 and nothing else, a folder's images 32 × 32 unless asked otherwise.
    """
    if not isinstance(data, (str, os.PathLike)):
        raise TypeError(f'data must be "digits" or a folder; got {type(data).__name__}')
    if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
        raise TypeError(f"size must be an int; got {type(size).__name__}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel; got {size}")
    if data != "digits":
        return load_folder(data, size=FOLDER_SIZE if size is None else size)
    if size not in (None, DIGITS_SIZE):
        raise ValueError(f"size is {size}, but digits are {DIGITS_SIZE} × {DIGITS_SIZE} pixels")
    return load_digits("train")


def load_digits(part: str = "train") -> ImageData:
    """scikit-learn's 1797 handwritten digits, 8 × 8 in 17 greys, split once and for all, each class in proportion.

    part: "train" (1297 images) or "held_out" (500, which no model here has seen).
    Alpaydin & Kaynak (1998), Optical Recognition of Handwritten Digits, UCI repository, the test part.
    Raises ImportError with the command that helps where scikit-learn is missing.
    """
    if part not in ("train", "held_out"):
        raise ValueError(f'part must be "train" or "held_out"; got {part!r}')
    try:
        from sklearn.datasets import load_digits as bundled_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "fastdiff-torch[train]"') from error

    digits = bundled_digits()
    pixels = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)  # [1797, 1, 8, 8], 0 … 16
    labels = torch.from_numpy(digits.target.astype(np.int64))
    held_out = _held_out(digits.target)
    chosen = torch.from_numpy(held_out if part == "held_out" else ~held_out)
    return ImageData(pixels[chosen], labels[chosen], tuple("0123456789"), white=16)


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Which digits are held out, bool [N]: the same share of each class, drawn by a generator that never changes."""
    shuffle = np.random.RandomState(0).permutation(len(labels))  # its stream is frozen by numpy's promise
    by_class = shuffle[np.argsort(labels[shuffle], kind="stable")]
    # Every k-th of a list sorted by class takes from each class its share, rounded.
    chosen = by_class[np.arange(HELD_OUT_DIGITS) * len(labels) // HELD_OUT_DIGITS]
    mask = np.zeros(len(labels), dtype=bool)
    mask[chosen] = True
    return mask


def load_folder(folder: str | os.PathLike[str], *, size: int) -> ImageData:
    """Every picture under `folder` that Pillow reads: turned upright, cropped to its central square, resized.

    Subfolders, where there are any, are the classes, in alphabetical order; each is read to any depth. The result is
    grey if every picture is, else RGB; what is transparent becomes white. Hidden files and other kinds of file are
    left out. Raises FileNotFoundError, NotADirectoryError, or ValueError naming a picture that cannot be read.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no folder {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    loose = [path for path in sorted(folder.iterdir()) if _is_picture(path)]
    by_class = {
        path.name: [file for file in sorted(path.rglob("*")) if _is_picture(file)]
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    by_class = {name: files for name, files in by_class.items() if files}
    if loose and by_class:
        raise ValueError(
            f"{folder} holds both pictures ({loose[0].name}, …) and folders of pictures ({next(iter(by_class))}, …); "
            "either put every picture into a class's folder or leave the folders out"
        )
    files = loose or [file for files in by_class.values() for file in files]
    if not files:
        raise ValueError(f"{folder} holds no picture that Pillow reads by its name (.png, .jpg, …)")

    pictures = [_read(file, size) for file in files]
    channels = max(picture.shape[0] for picture in pictures)
    pixels = torch.stack([picture.expand(channels, size, size) for picture in pictures])
    labels = [label for label, files in enumerate(by_class.values()) for _ in files]
    return ImageData(pixels, torch.tensor(labels, device="cpu") if by_class else None, tuple(by_class))


def _is_picture(path: Path) -> bool:
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind in _FORMATS and path.is_file() and not path.name.startswith(".")


def _read(file: Path, size: int) -> torch.Tensor:
    """One picture as uint8 [1 or 3, size, size]."""
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith(("I", "F")):  # Pillow would clip these to 8 bits without a word
                raise ValueError(f"its pixels are not 8-bit (Pillow's mode {picture.mode})")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("L" if opened.mode in ("1", "L", "LA", "La") else "RGB")
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise ValueError(f"cannot read the picture {file}: {error}") from error
    return torch.from_numpy(np.array(picture)).reshape(size, size, -1).permute(2, 0, 1).contiguous()
