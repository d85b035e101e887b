"""A picture made again from the recipe in it, and compared with it, pixel by pixel and bit by bit."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.acceleration.accelerate import accelerate
from fastdiff.checks import check_int
from fastdiff.images import write_gif
from fastdiff.models.trained import PACKAGED, TrainedModel, digits, load
from fastdiff.ops.native import cpu_threads
from fastdiff.pictures.embedded import Layout, open_picture, read, sha256_of
from fastdiff.pictures.grid import make_grid, picture_size, resolve_layout
from fastdiff.pictures.network import Identity, environment, identify
from fastdiff.pictures.recipe import Recipe, device_of
from fastdiff.text.load import load as load_words
from fastdiff.text.pipeline import Pipeline

_OPTIONS = ("channels_last", "compiled", "accelerated", "partly")


@dataclass(frozen=True, repr=False)
class Reproduction:
    """A picture beside what its recipe makes now; prints as the verdict.

    Attributes:
        path: of the picture.
        recipe: that stands in it.
        images: float32 [B, …], made now; of a film its last frame.
        same_bits: whether the images of now have the bits of then, before they become bytes.
        pixels, total: how many of the picture's pixels differ from those of now, and how many there are.
        worst, mean: their largest difference, and the mean over all pixels, in steps of 255.
        differences: (what, then, now): what the picture was made with, where it is something else here.
    """

    path: Path
    recipe: Recipe
    images: Tensor
    same_bits: bool
    pixels: int
    total: int
    worst: int
    mean: float
    differences: tuple[tuple[str, str, str], ...]

    @property
    def identical(self) -> bool:
        """Whether the picture's pixels are those of now."""
        return self.pixels == 0

    def __str__(self) -> str:
        if self.identical and self.same_bits:
            return f"{self.path}: identical, to the bit ({self.recipe})"
        apart = (
            f"{self.pixels:,} of {self.total:,} pixels differ, by at most {self.worst} of 255, by {self.mean:.2g} on "
            "average over all"
        )
        if self.identical:
            verdict = "the same pixels, but images that differ before they are rounded to bytes"
        elif self.same_bits:
            verdict = f"the images are identical, to the bit, but the file was changed since: {apart}"
        else:
            verdict = f"not identical: {apart}"
        lines = [f"  {name}: {then} then, {now} now" for name, then, now in self.differences]
        if not self.same_bits and not lines:
            lines = ["  nothing that the recipe names differs"]
        return "\n".join([f"{self.path}: {verdict} ({self.recipe})", *lines])

    __repr__ = __str__


def reproduce(
    picture: str | os.PathLike[str],
    model: Callable[..., Any] | TrainedModel | Pipeline | str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Reproduction:
    """Make a picture again by the recipe in it, and compare.

    picture: a PNG or GIF that ``fastdiff sample``, or ``save_grid`` or ``save_gif`` with a recipe, wrote.
    model: the network, in the dtype that it had, or a model's folder, which is brought into that dtype and accelerated
        as it was; None takes the folder that the recipe names. A network is used as it is. Of a picture of words a
        pipeline of ``fastdiff.load``, or what that loads.
    device: where a folder's network is to run; None is where it ran, if that is here, and else the CPU.
    threads: of the CPU; None takes as many as the first run, if the machine has so many cores.
    progress: show a bar.

    Raises:
        OSError: for a file or folder that is missing.
        ValueError: for a picture without a recipe, or one that is damaged, and where the network is another one.
    """
    path = Path(picture)
    if threads is not None:
        check_int("threads", threads, 1, 4096)
    recipe, layout = read(path)
    pixels = _pixels(path, recipe, layout)
    if device is None and torch.cuda.is_available() and recipe.made_with.get("device", "cpu") != "cpu":
        device = "cuda"
    network = _network(path, recipe, model, device)
    now = identify(network)
    if recipe.network.sha256 != now.sha256:
        raise ValueError(
            f"{path} was made by another network: {recipe.network.name}, {recipe.network.dtype}, sha256 "
            f"{_short(recipe.network)}; this one is {now.name}, {now.dtype}, {_short(now)}"
        )
    with cpu_threads(threads_of(recipe.made_with) if threads is None else threads):
        images, again, digest = _made_again(network, recipe, layout, progress)
        differences = _differences(recipe, now, device_of(network))
    if len(pixels) != len(again):  # a GIF's frames that are equal are one
        raise ValueError(f"{path} has {len(pixels)} different frames, its recipe makes {len(again)}")
    apart = np.abs(pixels.astype(np.int16) - again.astype(np.int16))
    return Reproduction(
        path,
        recipe,
        images,
        same_bits=digest == layout.sha256,
        pixels=int(apart.any(-1).sum()),
        total=apart[..., 0].size,
        worst=int(apart.max()),
        mean=float(apart.mean()),
        differences=differences,
    )


def load_pipeline(identity: Identity, source: str | os.PathLike[str], device: torch.device | str | None) -> Pipeline:
    """What ``fastdiff.load`` loads, in the dtype and acceleration of an identity."""
    dtype = getattr(torch, str(identity.dtype), torch.float32)
    pipe = load_words(source, device="cpu" if device is None else device, dtype=dtype, accelerate=False)
    if not isinstance(pipe, Pipeline):
        raise ValueError(f"{source} is a {type(pipe).__name__}, which draws no picture that carries a recipe")
    if (put := identity.accelerated) is not None:
        own = put.dtype == identity.dtype  # then each network's, of which an autoencoder's may be another
        accelerate(pipe.pipe, dtype="auto" if own and dtype != torch.float32 else getattr(torch, put.dtype),
                   exact_convolutions=put.exact_convolutions, batch_invariant=put.batch_invariant)  # fmt: skip
    return pipe


def load_network(identity: Identity, folder: str | os.PathLike[str], device: torch.device | str | None) -> Any:
    """A folder's network in the dtype, memory format and acceleration of an identity."""
    unet = (digits() if os.fspath(folder) == PACKAGED else load(folder)).unet
    where = torch.device(device) if device is not None else torch.device("cpu")
    dtype = getattr(torch, str(identity.dtype), None)
    layout = torch.channels_last if identity.channels_last else torch.contiguous_format
    unet.to(device=where, dtype=dtype if isinstance(dtype, torch.dtype) else None)
    unet.to(memory_format=layout)  # type: ignore[call-overload]  # documented, but torch's overloads leave it out
    if identity.accelerated is not None:
        how = identity.accelerated
        found: Any = getattr(torch, how.dtype, None)
        accelerate(
            unet, dtype=found, exact_convolutions=how.exact_convolutions, batch_invariant=how.batch_invariant
        )  # fmt: skip
    return unet


def _network(path: Path, recipe: Recipe, model: Any, device: Any) -> Any:
    identity, load = recipe.network, load_network if recipe.words is None else load_pipeline
    if isinstance(model, TrainedModel):
        return model.unet
    if model is not None and not isinstance(model, (str, os.PathLike)):
        return model
    folder = identity.folder if model is None else model
    if folder is None:
        raise ValueError(f"{path} was made by {identity.name}, which came from no folder: say which model it was")
    try:
        return load(identity, folder, device)
    except FileNotFoundError as error:
        if model is not None:
            raise
        raise FileNotFoundError(f"{path} was made by the model in {folder}; say where that is now: {error}") from None


def _made_again(
    network: Any, recipe: Recipe, layout: Layout, progress: bool
) -> tuple[Tensor, np.ndarray[Any, Any], str]:
    """The images, the pixels [frames, H, W, C] of their picture, and the images' SHA-256."""
    shown = {"columns": layout.columns, "scale": layout.scale, "gap": layout.gap}
    digest = hashlib.sha256()
    if layout.rows is None:
        images = recipe.sample(network, progress=progress)
        if layout.index is not None:
            images = images[layout.index : layout.index + 1]
        sha256_of(images, digest)
        return images, _frames(make_grid(images, **shown), 1, recipe), digest.hexdigest()
    pictures, images = [], torch.empty(0)
    for state in recipe.states(network, progress=progress):
        if state.row in layout.rows:
            images = state.x
            pictures.append(make_grid(images, **shown))
            sha256_of(images, digest)
    file = io.BytesIO()
    write_gif(file, pictures, layout.duration, layout.hold)
    with Image.open(file, formats=("GIF",)) as gif:
        return images, _frames(gif, len(pictures), recipe), digest.hexdigest()


def _pixels(path: Path, recipe: Recipe, layout: Layout) -> np.ndarray[Any, Any]:
    """The picture's own; ValueError where it has not the size that the recipe's images have in it."""
    shape = recipe.shape if layout.index is None else [1, *recipe.shape[1:]]
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise ValueError(f"{path} has a recipe of {shape}, which is no batch of pictures")
    width, height = picture_size(shape, *resolve_layout(shape, layout.columns, layout.scale, layout.gap))
    size = (layout.margin + width, height)
    with open_picture(path) as picture:
        if picture.size != size:
            raise ValueError(f"{path} has {'×'.join(map(str, picture.size))} pixels, its recipe makes "
                             f"{'×'.join(map(str, size))}: it was cropped or resized")  # fmt: skip
        try:
            return _frames(picture, 1 if layout.rows is None else len(layout.rows), recipe)[:, :, layout.margin :]
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None


def _frames(picture: Image.Image, most: int, recipe: Recipe) -> np.ndarray[Any, Any]:
    frames, mode = [], "L" if recipe.shape[1] == 1 else "RGB"
    for i in range(min(most, getattr(picture, "n_frames", 1))):
        picture.seek(i)
        frames.append(np.asarray(picture.convert(mode)).reshape(picture.height, picture.width, -1))
    return np.stack(frames)


def _differences(recipe: Recipe, now: Identity, device: torch.device) -> tuple[tuple[str, str, str], ...]:
    """(what, then, now) of what the bits may depend on and that is not what it was."""
    then = recipe.network
    pairs = [(name, told, environment(device).get(name, "unknown")) for name, told in recipe.made_with.items()]
    pairs += [(name.replace("_", " "), str(getattr(then, name)), str(getattr(now, name))) for name in _OPTIONS]
    return tuple(pair for pair in pairs if pair[1] != pair[2])


def threads_of(made_with: Mapping[str, str]) -> int | None:
    """As many threads as then, where there are so many cores."""
    then = made_with.get("threads", "")
    return int(then) if then.isdecimal() and 1 <= int(then[:6]) <= (os.cpu_count() or 1) else None


def _short(identity: Identity) -> str:
    return "unknown" if identity.sha256 is None else identity.sha256[:16]
