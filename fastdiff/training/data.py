"""Training images: scikit-learn's handwritten digits, a folder of pictures, a tensor, or a torch Dataset."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from fastdiff.checks import check_int
from fastdiff.training.pictures import is_picture, read_picture

DIGITS_SIZE = 8  # pixels a side
HELD_OUT_DIGITS = 500  # of 1797; never trained on
FOLDER_SIZE = 32  # pixels a side, unless asked otherwise


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled or unlabelled images of one size, held in memory as bytes.

    pixels: uint8 [N, C, H, W] from 0 to `white`. labels: int64 [N], indices into `classes`; None where there are none.
    """

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    white: int = 255

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image: [C, H, W]."""
        return tuple(self.pixels.shape[1:])

    def fingerprint(self) -> str:
        """What other images, or the same in another order, do not have."""
        return _sha256(self.pixels, self.labels)

    def images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The chosen images (all of them by default), float32 [n, C, H, W] in [-1, 1]."""
        return self.pixels[index].float() * (2 / self.white) - 1

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """A batch for a DataLoader: the images of an int64 index [n], and their labels [n] where there are any."""
        return self.images(index), None if self.labels is None else self.labels[index]


@dataclass(frozen=True, eq=False)
class TensorData:
    """Examples given as a tensor. values: [N, …], floating-point or bytes. labels: [N, …] or None."""

    values: Tensor
    labels: Tensor | None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.values.shape[1:])

    def fingerprint(self) -> str:
        """What other examples, or the same in another order, do not have."""
        return _sha256(self.values, self.labels)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The examples of an int64 index [n], float32 [n, …], and their labels where there are any."""
        return _scaled(self.values[index]), None if self.labels is None else self.labels[index]


@dataclass(frozen=True, eq=False)
class ItemData:
    """A torch Dataset with a length: each item a tensor or an array, or (that, a label)."""

    items: Any
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """How many items of which shape: reading all of them would take too long."""
        return f"{len(self)} items of {list(self.shape)}"

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The examples of an int64 index [n], float32 [n, …], and their labels where there are any."""
        examples, labels = zip(*(_item(self.items[i]) for i in index.tolist()), strict=True)
        for i, example in zip(index.tolist(), examples, strict=True):
            if example.shape != self.shape:
                raise ValueError(
                    f"items of data must have one shape; item 0 has {list(self.shape)}, item {i} {list(example.shape)}"
                )
        return torch.stack(examples), None if labels[0] is None else torch.stack(labels)


Data = ImageData | TensorData | ItemData


class Draws(Sampler[Tensor]):
    """The indices of one batch after another without end, drawn with replacement.

    They come from the generator when they are asked for, never ahead, so that its state is all that a checkpoint needs
    to keep. (torch's RandomSampler draws 32 ahead.)
    """

    def __init__(self, size: int, batch_size: int, generator: torch.Generator) -> None:
        self.size, self.batch_size, self.generator = size, batch_size, generator

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.randint(self.size, (self.batch_size,), generator=self.generator, device="cpu")


def of(data: Any, *, size: int | None = None, skip_broken: bool = False, progress: bool = False) -> Data:
    """Whatever `fastdiff.train` takes as data: "digits" or a folder (see `load`), a tensor [N, …], a pair of tensors
    (examples, labels), or a torch Dataset with a length.

    Raises TypeError or ValueError for anything else.
    """
    if isinstance(data, (str, os.PathLike)):
        return load(data, size=size, skip_broken=skip_broken, progress=progress)
    if isinstance(data, (ImageData, TensorData, ItemData)):
        return data
    if size is not None:
        raise ValueError(f"size is {size}, but only pictures that are read from a folder are resized")
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    values, labels = data if pair else (data, None)
    if isinstance(values, Tensor):
        if values.ndim < 2 or len(values) == 0:
            raise ValueError(f"data must be a tensor [N, …] of at least one example; got {list(values.shape)}")
        if labels is not None and (labels.ndim < 1 or len(labels) != len(values)):
            raise ValueError(f"data has {len(values)} examples, but labels of shape {list(labels.shape)}")
        _scaled(values[:1])
        return TensorData(values.detach().cpu(), None if labels is None else labels.detach().cpu())
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, (tuple, list, dict)):
        raise TypeError(
            'data must be "digits", a folder, a tensor [N, …], a pair of tensors (examples, labels) or a torch Dataset '
            f"with a length (of a DataLoader: its .dataset); got {type(data).__name__}"
        )
    if len(data) == 0:
        raise ValueError("data is an empty Dataset")
    return ItemData(data, tuple(_item(data[0])[0].shape))


def _item(item: Any) -> tuple[Tensor, Tensor | None]:
    """One example as float32, and its label as a tensor."""
    label = None
    if isinstance(item, (tuple, list)) and item:
        item, label = item[0], (torch.as_tensor(item[1]) if len(item) > 1 else None)
    if isinstance(item, np.ndarray):
        item = torch.from_numpy(item)
    if not isinstance(item, Tensor):
        raise TypeError(
            f"an item of data must be a tensor or an array, or (that, a label); got a {type(item).__name__}: "
            "give the Dataset a transform"
        )
    return _scaled(item), label


def _scaled(values: Tensor) -> Tensor:
    """float32: bytes 0 … 255 as −1 … 1, floating point as it is."""
    if values.dtype == torch.uint8:
        return values.float() / 127.5 - 1
    if not values.is_floating_point():
        raise TypeError(f"data must be floating-point, or bytes 0 … 255; got {values.dtype}")
    return values.float()


def _sha256(values: Tensor, labels: Tensor | None) -> str:
    digest = hashlib.sha256(f"{list(values.shape)}".encode())
    for part in (values, labels):
        if part is not None:
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(
    data: str | os.PathLike[str], *, size: int | None = None, skip_broken: bool = False, progress: bool = False
) -> ImageData:
    """The training images that `data` names: "digits" (their training part), or a folder.

    A folder that is itself named digits is written ./digits.
    size: pixels a side; digits are 8 × 8 and nothing else, a folder's images 32 × 32 unless asked otherwise.
    skip_broken: see `load_folder`. progress: a bar while a folder is read.
    """
    if not isinstance(data, (str, os.PathLike)):
        raise TypeError(f'data must be "digits" or a folder; got {type(data).__name__}')
    if size is not None:
        check_int("size", size, 1, 1 << 16)
    if data != "digits":
        side = FOLDER_SIZE if size is None else size
        return load_folder(data, size=side, skip_broken=skip_broken, progress=progress)
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


def load_folder(
    folder: str | os.PathLike[str], *, size: int, skip_broken: bool = False, progress: bool = False
) -> ImageData:
    """Every picture under `folder` that Pillow reads: turned upright, cropped to its central square, resized.

    Subfolders, where there are any, are the classes, in alphabetical order; each is read to any depth. The result is
    grey if every picture is, else RGB; what is transparent becomes white. Hidden files and other kinds of file are
    left out. skip_broken: leave out, with a warning that counts them, the pictures that cannot be read. progress: a
    bar. Raises FileNotFoundError, NotADirectoryError, or ValueError that lists every picture that cannot be read.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no folder {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    loose = [path for path in sorted(folder.iterdir()) if is_picture(path)]
    by_class = {
        path.name: [file for file in sorted(path.rglob("*")) if is_picture(file)]
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    by_class = {name: files for name, files in by_class.items() if files}
    if loose and by_class:
        raise ValueError(
            f"{folder} holds both pictures ({loose[0].name}, …) and folders of pictures ({next(iter(by_class))}, …); "
            "either put every picture into a class's folder or leave the folders out"
        )
    files = [(file, 0) for file in loose]
    files += [(file, label) for label, found in enumerate(by_class.values()) for file in found]
    if not files:
        raise ValueError(f"{folder} holds no picture that Pillow reads by its name (.png, .jpg, …)")

    pictures, labels, broken = [], [], []
    for file, label in tqdm(files, desc="reading", unit="picture", disable=not progress, leave=False):
        try:
            pictures.append(read_picture(file, (size, size)))
            labels.append(label)
        except ValueError as error:
            broken.append(str(error))
    if broken and not (skip_broken and pictures):
        several = f"{len(broken)} of {len(files)} pictures in {folder} cannot be read:\n  " if len(broken) > 1 else ""
        raise ValueError(several + "\n  ".join(broken))
    if broken:
        told = "\n  ".join(broken)
        warnings.warn(f"{len(broken)} of {len(files)} pictures in {folder} were left out:\n  {told}", stacklevel=2)
    channels = max(picture.shape[0] for picture in pictures)
    pixels = torch.stack([picture.expand(channels, size, size) for picture in pictures])
    return ImageData(pixels, torch.tensor(labels, device="cpu") if by_class else None, tuple(by_class))
