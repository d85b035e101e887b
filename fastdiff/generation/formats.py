"""Images as the bytes of a shard, and back: a tar (WebDataset), a folder of PNGs, or NumPy's npz."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastdiff.files import atomic_write, parse_json, sync_folder

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Entry(NamedTuple):
    """An image in a shard: its name without a suffix, what is known of it, and its pixels [H, W, C] as a PNG."""

    name: str
    record: dict[str, Any]
    png: bytes


def to_png(pixels: Pixels, info: Any = None) -> bytes:
    """uint8 [H, W, C], C = 1 or 3."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def from_png(png: bytes) -> Pixels:
    with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
        return np.asarray(picture).reshape(picture.height, picture.width, -1)


def sha256(pixels: Pixels) -> str:
    """Of an image's bytes, [H, W, C] in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def write_tar(path: Path, entries: Iterable[Entry]) -> None:
    """A tar whose bytes depend on the entries alone."""
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, record, png in entries:
            for suffix, content in (("png", png), ("json", _json(record))):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def read_tar(path: Path) -> Iterator[Entry]:
    with tarfile.open(path, mode="r:") as tar:
        members = iter(tar)
        for member in members:
            content = [tar.extractfile(one) for one in (member, next(members))]
            png, record = (b"" if file is None else file.read() for file in content)
            yield Entry(member.name.removesuffix(".png"), _record(record), png)


def write_shard(format: str, path: Path, entries: Iterable[Entry]) -> None:
    """Write a shard under a name that nothing else has, all of it on the disk when this returns."""
    if format == "tar":
        write_tar(path, entries)
    elif format == "npz":
        _write_npz(path, entries)
    else:
        path.mkdir()
        for name, record, png in entries:
            for suffix, content in (("png", png), ("json", _json(record))):
                with open(path / f"{name}.{suffix}", "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        sync_folder(path)


def read_records(format: str, path: Path) -> Iterator[dict[str, Any]]:
    """The records of a published shard, nothing checked."""
    if format == "npz":
        with np.load(path, allow_pickle=False) as arrays:
            yield from (_record(str(record).encode()) for record in arrays["records"])
    else:
        yield from (entry.record for entry in (read_tar(path) if format == "tar" else _read_folder(path)))


def read_shard(format: str, path: Path) -> Iterator[tuple[dict[str, Any], Pixels]]:
    """The records and pixels of a published shard. Damaged bytes raise nearly anything.

    A PNG is compared with the SHA-256 of its file, too, which its recipe is part of.
    """
    if format == "npz":
        with np.load(path, allow_pickle=False) as arrays:
            images, records, numbers, labels = (arrays[name] for name in ("images", "records", "numbers", "labels"))
            for pixels, record, number, label in zip(images, records, numbers, labels, strict=True):
                told = _record(str(record).encode())
                if (told["number"], told.get("label", -1)) != (number, label):
                    raise ValueError(f"the number or label of image {told['number']} is not its record's")
                yield told, pixels
        return
    for entry in read_tar(path) if format == "tar" else _read_folder(path):
        check_png(entry)
        yield entry.record, from_png(entry.png)


def check_png(entry: Entry) -> None:
    if hashlib.sha256(entry.png).hexdigest() != entry.record.get("png_sha256"):
        raise ValueError(f"{entry.name}.png is not the file that its record names")


def size_of(format: str, entries: list[Entry]) -> int:
    """About how many bytes some images take in a shard."""
    if format == "npz":
        return sum(from_png(entry.png).size + len(_json(entry.record)) for entry in entries)
    blocks = 4096 if format == "png" else 512  # a file's on a disk; a member's, behind a header of one block
    files = [size for entry in entries for size in (len(entry.png), len(_json(entry.record)))]
    return sum((-(-size // blocks) + (format == "tar")) * blocks for size in files)


def shard_sha256(format: str, path: Path) -> str:
    """Of a shard's file; of a folder the files' names and SHA-256, in order."""
    if format != "png":
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    digest = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        digest.update(f"{name} {hashlib.sha256((path / name).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _digest(file: Any) -> str:
    """``hashlib.file_digest``, which Python 3.10 has not."""
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


def _write_npz(path: Path, entries: Iterable[Entry]) -> None:
    """images uint8 [n, H, W, C], numbers and labels (-1 for none) int64 [n], and records, a JSON object each."""
    images, records = [], []
    for _, record, png in entries:
        images.append(from_png(png))
        records.append({name: value for name, value in record.items() if name != "png_sha256"})
    arrays = {
        "images": np.stack(images),
        "numbers": np.array([record["number"] for record in records], np.int64),
        "labels": np.array([record.get("label", -1) for record in records], np.int64),
        "records": np.array([_json(record).decode() for record in records]),
    }
    with atomic_write(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy takes them for its own option


def _read_folder(path: Path) -> Iterator[Entry]:
    for place in sorted(path.glob("*.json"), key=lambda place: (len(place.name), place.name)):
        yield Entry(place.stem, _record(place.read_bytes()), place.with_suffix(".png").read_bytes())


def _json(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode()


def _record(text: bytes) -> dict[str, Any]:
    record = parse_json(text)
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object; got {type(record).__name__}")
    return record
