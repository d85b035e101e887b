"""Small sets of pictures in every form, and features that tests can compute."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdiff.evaluation.extractors import Features, Identity


def pixels(n: int, generator: torch.Generator, side: int = 8, channels: int = 3) -> np.ndarray:
    """uint8 [n, side, side, channels]."""
    return torch.randint(0, 256, (n, side, side, channels), generator=generator, dtype=torch.uint8).numpy()


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture.squeeze()).save(file, format="PNG")
    return file.getvalue()


def write(kind: str, place: Path, pictures: np.ndarray) -> Path:
    """A set of a kind: png, tar (two, with other members), tar.file, npz (two), npz.file."""
    if kind == "tar.file":
        return write_tar(place.with_suffix(".tar"), dict(enumerate(map(png, pictures))))
    if kind == "npz.file":
        np.savez(place.with_suffix(".npz"), pictures)
        return place.with_suffix(".npz")
    place.mkdir()
    half = len(pictures) // 2 + 1
    for number, start in enumerate((0, half)):
        part = pictures[start : start + half]
        if kind == "tar":
            write_tar(place / f"{number}.tar", {start + i: png(picture) for i, picture in enumerate(part)})
        elif kind == "npz":
            np.savez(place / f"{number}.npz", labels=np.arange(len(part)), images=part)
        else:
            (place / str(number)).mkdir()
            for i, picture in enumerate(part):
                (place / str(number) / f"{start + i:04d}.png").write_bytes(png(picture))
    return place


def write_tar(path: Path, contents: dict[int, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, content in contents.items():
            for name, told in ((f"{number:04d}.png", content), (f"{number:04d}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(told)
                tar.addfile(member, io.BytesIO(told))
    return path


def means(name: str = "means", channels: int = 3) -> Features:
    """The mean of each quarter of each channel."""

    def function(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    return Features(function, Identity(name=name, sha256="0" * 64), torch.device("cpu"), channels)
