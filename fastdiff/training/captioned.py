"""Pictures with captions: the emoji data set of tools/emoji.py, or anyone's folder."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import fastdiff
from fastdiff.checks import check_choice
from fastdiff.training.pictures import is_picture, read_picture

EMOJI_SIZE, FOLDER_SIZE = 64, 64  # pixels a side
PARTS = ("train", "held_out", "held_out_pair")
SHEET, LINES, METADATA = "sheet.webp", "captions.jsonl", "metadata.jsonl"


@dataclass(frozen=True, eq=False)
class Captioned:
    """Captioned pictures of one size, held in memory as bytes.

    pixels: uint8 [N, 3, H, W]. captions: N tuples of one or more wordings that mean the same; the first is the
    picture's own. rows: N mappings with the emoji's style, subject, tone and part; empty for a folder.
    """

    pixels: Tensor
    captions: tuple[tuple[str, ...], ...]
    rows: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture: [3, H, W]."""
        return tuple(self.pixels.shape[1:])

    def images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The chosen pictures, float32 [n, 3, H, W] in [-1, 1]."""
        return self.pixels[index].float() / 127.5 - 1

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """A batch for a DataLoader: the pictures of an int64 index [n], and that index."""
        return self.images(index), index

    def fingerprint(self) -> str:
        """What other pictures or captions, or the same in another order, do not have."""
        digest = hashlib.sha256(json.dumps(self.captions, ensure_ascii=False).encode())
        digest.update(self.pixels.contiguous().numpy().tobytes())
        return digest.hexdigest()


def is_captioned(data: str | os.PathLike[str]) -> bool:
    """Whether the data are pictures with captions, rather than digits or classes of pictures."""
    folder = Path(data)
    if os.fspath(data) in ("emoji", "digits"):
        return os.fspath(data) == "emoji"
    if (folder / LINES).exists() or (folder / METADATA).exists():
        return True
    return any(path.with_suffix(".txt").exists() for path in folder.rglob("*") if is_picture(path))


def load_captioned(
    data: str | os.PathLike[str],
    *,
    size: int | None = None,
    part: str | None = "train",
    subset: str | None = "emoji-240",
    skip_broken: bool = False,
    progress: bool = False,
) -> Captioned:
    """Captioned pictures in memory.

    Args:
        data: "emoji", a folder that tools/emoji.py wrote, or a folder of pictures: with a metadata.jsonl, a line
            ``{"file_name": "a.png", "text": "a caption"}`` a picture (the Hugging Face image folder; text may be a list
            of wordings), or with a file of the same name and the ending .txt beside each picture, a wording a line.
        size: pixels a side, 64 unless asked otherwise; pictures are cropped to their central square and resized.
        part, subset: of the emoji alone: "train", "held_out" or "held_out_pair", None for all of them; "emoji-240",
            "rest", None for both.
        skip_broken: leave out, with a warning that counts them, the pictures that cannot be read.
        progress: a bar while a folder is read.

    Raises:
        FileNotFoundError, ValueError: what is missing or cannot be read, named.
    """
    folder = _emoji_folder() if os.fspath(data) == "emoji" else Path(data)
    if (folder / LINES).exists():
        return _emoji(folder, size, part, subset)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    size = FOLDER_SIZE if size is None else size
    pictures, captions, broken = [], [], []
    described = list(_described(folder))
    for file, wordings in tqdm(described, desc="reading", unit="picture", disable=not progress, leave=False):
        try:
            pictures.append(read_picture(file, (size, size)).expand(3, size, size))
            captions.append(wordings)
        except ValueError as error:
            broken.append(str(error))
    told = "\n  ".join(broken)
    if broken and not (skip_broken and pictures):
        raise ValueError(f"{len(broken)} of {len(described)} pictures in {folder} cannot be read:\n  {told}")
    if broken:
        warnings.warn(f"{len(broken)} of {len(described)} pictures in {folder} were left out:\n  {told}", stacklevel=2)
    return Captioned(torch.stack(pictures), tuple(captions))


def _described(folder: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Each picture of a folder with its caption's wordings."""
    metadata = folder / METADATA
    if metadata.exists():
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name, text = entry["file_name"], entry["text"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f'{metadata}, line {number} must be {{"file_name": …, "text": …}}; {error!r}'
                ) from error
            yield folder / name, _wordings([text] if isinstance(text, str) else text, f"{metadata}, line {number}")
        return
    pictures = sorted(path for path in folder.rglob("*") if is_picture(path))
    lacking = [path.name for path in pictures if not path.with_suffix(".txt").exists()]
    if lacking or not pictures:
        told = f"no .txt beside {', '.join(lacking[:3])}{', …' * (len(lacking) > 3)}" if lacking else "no picture"
        raise ValueError(f"{folder} has no {METADATA} and {told}: captions are what a model of words learns from")
    for path in pictures:
        text = path.with_suffix(".txt").read_text(encoding="utf-8")
        yield path, _wordings(text.splitlines(), os.fspath(path.with_suffix(".txt")))


def _wordings(texts: Any, where: str) -> tuple[str, ...]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: a caption must be text, or a list of texts")
    wordings = tuple(text.strip() for text in texts if text.strip())
    if not wordings:
        raise ValueError(f"{where}: the caption is empty")
    return wordings


# ---- the emoji


def _emoji_folder() -> Path:
    """Where the sheet is: below the working folder, or in the clone that is imported; an installation has none."""
    places = Path("data/emoji"), Path(fastdiff.__file__).parent.parent / "data" / "emoji"
    for place in places:
        if (place / LINES).exists():
            return place
    raise FileNotFoundError(
        f"no emoji in {' or '.join(map(str, places))}: they are in the repository, not in an installed package; give "
        "their folder as the data, or draw them with tools/emoji.py"
    )


def _emoji(folder: Path, size: int | None, part: str | None, subset: str | None) -> Captioned:
    if size not in (None, EMOJI_SIZE):
        raise ValueError(f"size is {size}, but the emoji are {EMOJI_SIZE} × {EMOJI_SIZE} pixels")
    if part is not None:
        check_choice("part", part, PARTS)
    rows = [json.loads(line) for line in (folder / LINES).read_text(encoding="utf-8").splitlines()]
    chosen = [i for i, row in enumerate(rows) if part in (None, row["part"]) and subset in (None, row["subset"])]
    sheet = _sheet(folder / SHEET)
    columns = sheet.shape[1] // EMOJI_SIZE
    index = np.array(chosen)
    tiles = sheet.reshape(-1, EMOJI_SIZE, columns, EMOJI_SIZE, 3)[index // columns, :, index % columns]
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()
    return Captioned(pixels, tuple(wordings(rows[i]) for i in chosen), tuple(rows[i] for i in chosen))


def _sheet(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]. Pillow's bound on the size of pictures is for those of strangers."""
    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def wordings(row: dict[str, Any]) -> tuple[str, ...]:
    """Ways to ask for an emoji; the first is the data set's own."""
    style, subject, tone = row["style"], row["subject"], row["tone"]
    if not tone:
        return (
            f"{style} style {subject}",
            f"a {subject}, {style} style",
            f"a {subject} in {style} style",
            f"{subject} {style}",
            f"{style} {subject}",
        )
    return (
        f"{style} style {subject} {tone} skin tone",
        f"a {subject}, {tone} skin, {style} style",
        f"a {subject} with {tone} skin tone in {style} style",
        f"{subject} {tone} skin {style}",
        f"a {tone} skin {subject}, {style} style",
        f"{style} {subject}, {tone} skin",
    )
