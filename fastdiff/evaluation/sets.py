"""Sets of pictures, one after another: folders, tars, arrays, and what `fastdiff generate` wrote."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.checks import check_int
from fastdiff.evaluation.arrays import Array, array_of
from fastdiff.generation.formats import read_shard, sha256
from fastdiff.generation.job import Folder, Job
from fastdiff.generation.manifest import in_place
from fastdiff.training.pictures import is_picture, names_picture, read_picture

BATCH = 64  # pictures that a network sees at a time, wherever shards end
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises

Picture = Path | Image.Image | np.ndarray[Any, np.dtype[np.uint8]]  # an array is uint8 [H, W, C], C = 1 or 3


@dataclass(frozen=True, eq=False)
class Pictures:
    """A set of square pictures of one size, of which one batch at a time is in memory.

    Attributes:
        name: the folder's or the file's.
        told: what it is, in words, once it was read.
        count: how many there are. side: pixels a side.
        resized: whether pictures are cropped and resized to that, or must be so.
        read: a generator of all of them, in an order that never changes, each with its name.
    """

    name: str
    told: str
    count: int
    side: int
    resized: bool
    read: Callable[[], Iterator[tuple[str, Picture]]]

    def batches(self, channels: int, progress: bool = False) -> Iterator[Tensor]:
        """float32 [B, channels, side, side] in [-1, 1]; grey pictures are repeated where three channels are asked for.

        Raises ValueError that names a picture that cannot be read or has another size, and where some were added or
        lost meanwhile.
        """
        with tqdm(total=self.count, desc=self.name, unit="image", disable=not progress, leave=False) as bar:
            batch: list[Tensor] = []
            read = 0
            for name, picture in self.read():
                batch.append(self._pixels(name, picture, channels))
                bar.update()
                read += 1
                if len(batch) == BATCH:
                    yield torch.stack(batch).float() / 127.5 - 1
                    batch = []
            if batch:
                yield torch.stack(batch).float() / 127.5 - 1
            if read != self.count:
                raise ValueError(f"{self.name} had {self.count} pictures, and {read} when they were read")

    def _pixels(self, name: str, picture: Picture, channels: int) -> Tensor:
        size = (self.side, self.side)
        if not self.resized:
            _check_size(name, picture, self.side, self.name)
        if isinstance(picture, np.ndarray) and picture.shape[:2] == size:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # a copy, which torch may write to
        else:
            pixels = _read(name, picture, size)
        if len(pixels) not in (1, channels):
            raise ValueError(f"{name} is in colour, and the features are of pictures of {channels} channel")
        return pixels.expand(channels, -1, -1)


def open_pictures(path: Path, size: int | None = None) -> Pictures:
    """A folder of pictures (in folders within it, too), of tars or of npz files, one that ``fastdiff generate`` wrote,
    or a tar or an npz.

    Tars hold pictures (WebDataset; what else is in them is passed over), an npz an array "images" or "arr_0", uint8
    [N, H, W, C]. Of a generated set every image is compared with its hash as it is read.
    size: pixels a side to which pictures are cropped and resized; None asks that all are square and of one size.
    Raises FileNotFoundError, NotADirectoryError or ValueError: nothing there, no pictures, several sizes.
    """
    if size is not None:
        check_int("size", size, 1, 1 << 13)
    if not path.exists():
        raise FileNotFoundError(f"no folder or file {path}")
    if not path.is_dir():
        if path.suffix not in (".tar", ".npz"):
            raise NotADirectoryError(f"{path} is not a folder, nor a tar or an npz")
        return _of_tars(path, [path], size) if path.suffix == ".tar" else _of_arrays(path, [path], size)
    if (path / "job.json").exists():
        return _of_job(path, size)
    files = sorted(file for file in path.rglob("*") if not file.name.startswith("."))
    found = {kind: [file for file in files if file.suffix == kind] for kind in (".tar", ".npz")}
    found["pictures"] = [file for file in files if is_picture(file)]
    kinds = [kind for kind, some in found.items() if some]
    if not kinds:
        raise ValueError(f"{path} holds no picture that Pillow reads by its name (.png, .jpg, …), no tar and no npz")
    if len(kinds) > 1:
        told = ", ".join(f"{len(found[kind])} {kind}" for kind in kinds)
        raise ValueError(f"{path} holds {told}: a set is of one kind")
    of = {".tar": _of_tars, ".npz": _of_arrays, "pictures": _of_files}[kinds[0]]
    return of(path, found[kinds[0]], size)


# ---- what each kind of set reads


def _of_files(path: Path, files: Sequence[Path], size: int | None) -> Pictures:
    def read() -> Iterator[tuple[str, Picture]]:
        yield from ((str(file), file) for file in files)

    side = size
    for file in files if size is None else ():  # only headers are read
        side = _check_size(str(file), file, side, str(files[0]))
    return _pictures(path, f"{len(files):,} pictures", len(files), side, size, read)


def _of_tars(path: Path, tars: Sequence[Path], size: int | None) -> Pictures:
    def members(contents: bool) -> Iterator[tuple[str, bytes]]:
        for file in tars:
            try:
                with tarfile.open(file) as tar:
                    for member in tar:
                        if member.isfile() and names_picture(member.name):
                            content = tar.extractfile(member) if contents else None
                            yield f"{file}:{member.name}", b"" if content is None else content.read()
                        tar.members.clear()  # type: ignore[attr-defined]  # it keeps all that it has passed
            except Exception as error:  # damaged bytes raise nearly anything
                raise ValueError(f"cannot read the tar {file}: {error}") from error

    def read() -> Iterator[tuple[str, Picture]]:
        yield from ((name, _opened(name, content)) for name, content in members(contents=True))

    count = sum(1 for _ in members(contents=False))
    return _pictures(path, f"{count:,} pictures in tars", count, None, size, read)


def _of_arrays(path: Path, files: Sequence[Path], size: int | None) -> Pictures:
    arrays: list[Array] = [array_of(file) for file in files]

    def read() -> Iterator[tuple[str, Picture]]:
        for array in arrays:
            yield from ((f"{array.path}[{i}]", picture) for i, picture in enumerate(array.pictures()))

    count = sum(array.count for array in arrays)
    return _pictures(path, f"{count:,} pictures in arrays", count, None, size, read)


def _of_job(path: Path, size: int | None) -> Pictures:
    folder = Folder(path)
    job = folder.read()
    assert job is not None  # it has a job.json
    shards = sorted(folder.published(job))
    count = sum(len(job.numbers(shard)) for shard in shards)

    def read() -> Iterator[tuple[str, Picture]]:
        for shard in shards:
            place = folder.shard(job, shard)
            images = _verified(job, shard, place)
            while True:
                try:
                    number, pixels = next(images)
                except StopIteration:
                    break
                except Exception as error:  # damaged bytes raise nearly anything
                    again = f"`fastdiff verify {path} --discard` removes it, and `fastdiff generate` makes it again"
                    raise ValueError(f"{place} is damaged: {error}; {again}") from error
                yield f"{place}, image {number}", pixels

    missing = job.shards - len(shards)
    told = f"{count:,} of {job.num:,} images, {missing} of {job.shards} shards are missing" if missing else (
        f"{count:,} images")  # fmt: skip
    return _pictures(path, f"{told} of `fastdiff generate`, each compared with its hash", count, None, size, read)


def _verified(job: Job, shard: int, place: Path) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.uint8]]]]:
    """A shard's images, each of which is what its record says, in the place that the job gives it."""
    pixels: list[np.ndarray[Any, np.dtype[np.uint8]]] = []

    def records() -> Iterator[dict[str, Any]]:
        for record, image in read_shard(job.format, place):
            if sha256(image) != record["sha256"]:
                raise ValueError(f"image {record['number']} is not the one that its record names")
            pixels.append(image)
            yield record

    for record in in_place(job, shard, records()):
        yield record["number"], pixels.pop()


# ---- pictures


def _pictures(
    path: Path, told: str, count: int, side: int | None, size: int | None, read: Callable[[], Iterator[Any]]
) -> Pictures:
    """The side of the first picture is that of all, where none is asked for."""
    if count == 0:
        raise ValueError(f"{path} holds no picture: {told}")
    if size is None and side is None:
        name, picture = next(read())
        side = _check_size(name, picture, None, "")
    assert side is not None or size is not None
    return Pictures(str(path), f"{path}: {told}", count, size or side or 0, size is not None, read)


def _check_size(name: str, picture: Picture, side: int | None, of: str) -> int:
    """The side of a square picture, which must be that of others."""
    if isinstance(picture, np.ndarray):
        height, width = picture.shape[:2]
    elif isinstance(picture, Image.Image):
        width, height = picture.size
    else:
        try:
            with Image.open(picture) as opened:
                width, height = opened.size
        except UNREADABLE as error:
            raise ValueError(f"cannot read the picture {name}: {error}") from error
    side = side or width
    if (width, height) != (side, side):
        others = f", and {of} {side} wide" if of else ""
        raise ValueError(
            f"pictures must be square and of one size; {name} is {width}×{height}{others}: a size (--size) crops and "
            "resizes all"
        )
    return side


def _opened(name: str, content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except UNREADABLE as error:
        raise ValueError(f"cannot read the picture {name}: {error}") from error


def _read(name: str, picture: Picture, size: tuple[int, int]) -> Tensor:
    if isinstance(picture, Path):
        return read_picture(picture, size)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    try:
        return read_picture(picture, size)
    except ValueError as error:
        raise ValueError(f"cannot read the picture {name}: {error.__cause__ or error}") from error
