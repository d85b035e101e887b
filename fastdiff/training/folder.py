"""The folder of a training run: what may be in it, its checkpoint, its records and pictures."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from fastdiff.files import atomic_write, check_writable, remove_leftovers
from fastdiff.images import make_grid
from fastdiff.models.checkpoint import CONFIG, PICKLE, SAFETENSORS
from fastdiff.pictures.figure import new_figure
from fastdiff.pictures.grid import with_names

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"  # the averaged weights of a network that has no format of its own

# What a run writes, as regular expressions: what a killed run left half written of these is cleared away, and the files
# themselves where a run is to overwrite them.
_FILES = "|".join(
    map(re.escape, (CHECKPOINT, WEIGHTS, SAFETENSORS, CONFIG, "scheduler_config.json", "training.json", "loss.png"))
)
_SAMPLES = r"step-\d{6,}\.png"


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Say why `out` cannot be used, if so."""
    if resume and overwrite:
        raise ValueError("resume goes on with what is there, overwrite starts anew: give one of them")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out must be a folder; {out} is a file")
    found = (out / CHECKPOINT).exists(), weights_in(out)
    if resume and not any(found):
        raise FileNotFoundError(f"nothing to resume: {out} holds no {CHECKPOINT} and no weights; start without resume")
    if resume or overwrite:
        return
    if found[0]:
        raise FileExistsError(f"{out} holds a {CHECKPOINT} already: resume it, overwrite it, or choose another folder")
    if found[1]:
        raise FileExistsError(
            f"{out} holds a model's {found[1].name}, but no {CHECKPOINT} to resume from: resume starts again from its "
            "weights, overwrite without them; or choose another folder"
        )


def weights_in(out: Path) -> Path | None:
    """The weights that a run, or someone else, left in a folder."""
    return next((out / name for name in (SAFETENSORS, PICKLE, WEIGHTS) if (out / name).exists()), None)


def prepare_folder(out: Path, *, overwrite: bool) -> None:
    """Make `out`, know that it can be written, and clear away what a killed run had half written, nothing else.

    overwrite: remove what an earlier run wrote, too.
    """
    samples = out / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    check_writable(out / CONFIG)
    remove_leftovers(out, _FILES)
    remove_leftovers(samples, _SAMPLES)
    if overwrite:
        for folder, names in ((out, rf"{_FILES}|{re.escape(PICKLE)}"), (samples, _SAMPLES)):
            for path in folder.iterdir():
                if re.fullmatch(names, path.name) and path.is_file():
                    path.unlink()


def write_torch(path: Path, content: Any) -> None:
    """What torch.save writes, whole or not at all; a full disk is told with the file's name."""
    buffer = io.BytesIO()  # written by torch itself, a full disk would be told as a RuntimeError of its own
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What a run's checkpoint holds; ValueError for a file that is damaged or something else's."""
    state = read_torch(path, device)
    needed: dict[str, Any] = {"settings": dict, "fingerprint": str, "environment": dict, "step": int}
    needed |= {"seconds": (int, float), **dict.fromkeys(("losses", "generator", "model", "ema", "optimizer"), object)}
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of fastdiff train")
    for name, kind in needed.items():
        if name not in state:
            raise ValueError(f"{path} is no checkpoint of fastdiff train: it lacks {name}")
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise ValueError(f"{path} is no checkpoint of fastdiff train: its {name} is a {type(state[name]).__name__}")
    return state


def read_torch(path: Path, device: torch.device) -> Any:
    """What a file of torch.save holds, without running code of it; ValueError for one that is damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a damaged pickle's seek
            raise
        reason = [type(error).__name__, *str(error).splitlines()[:1]]
        raise ValueError(f"{path} is unreadable ({': '.join(reason)})") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def plot_loss(path: Path, steps: list[int], losses: list[float]) -> None:
    """The curve as a PNG. Raises ImportError with the command that helps where matplotlib is missing."""
    figure = new_figure(6, 4, "train")
    axes = figure.subplots()
    axes.semilogy(steps, losses)
    axes.set(xlabel="step", ylabel="mean squared error")
    axes.grid(alpha=0.3, which="both")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def save_samples(path: str | os.PathLike[str], images: torch.Tensor, columns: int, names: list[str]) -> None:
    """A grid as a PNG, with a name beside each of its rows where there are any. images: [B, 1 or 3, H, W]."""
    picture = make_grid(images, columns=columns)
    if names:
        picture = with_names(picture, names)
    with atomic_write(path) as file:
        picture.save(file, format="PNG")
