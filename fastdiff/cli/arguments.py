"""What several commands read: a device, a dtype, options of a sampler, a schedule, the labels of the images."""

from __future__ import annotations

import ast
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_betas", "edm", "flow")


Model = Annotated[
    Path | None,
    typer.Option(help="A folder written by `fastdiff train` or diffusers. [default: the digits in the package]"),
]
ClassName = Annotated[
    str | None, typer.Option("--class", help="One class for all images, by name. [default: all classes in turn]")
]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale; 1 is none. [default: the model's own]")
]
Option = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Another argument of the sampler, such as order=3; may be repeated."),
]
Device = Annotated[
    str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …, or auto: the GPU where there is one.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=4096, help="Threads of the CPU. [default: torch's choice, one a core]")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress, and say nothing but warnings and errors.")
]


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def options(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is a number, True, False, None, numbers with commas between, or a word."""
    options: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise ValueError(f"--option must be NAME=VALUE; got {pair!r}")
        if name in options:
            raise ValueError(f"--option names {name} twice")
        try:
            options[name] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[name] = value.strip()
    return options


def whole_numbers(name: str, text: str) -> list[int]:
    """Numbers, 1 and more, with commas between."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between; got {text!r}") from None
    if min(numbers) < 1:
        raise ValueError(f"{name} must be at least 1; got {text!r}")
    return numbers


def schedule_of(name: str, tokens: int | None = None) -> tuple[Any, str | None]:
    """A schedule's name as it is, or what a folder's scheduler_config.json is and what its network predicts."""
    from fastdiff.schedules import from_diffusers, prediction_from_diffusers

    if Path(name).is_dir():
        return from_diffusers(name, tokens=tokens), prediction_from_diffusers(name)
    if tokens is not None:
        raise ValueError("--tokens goes with a folder as --schedule")
    return name, None


def trained_model(folder: Path | None) -> Any:
    """The model in a folder, or the digits in the package."""
    from fastdiff.models import digits, load

    return digits() if folder is None else load(folder)


def check_pictures(shape: tuple[int, int, int], model: Path | None) -> None:
    """That images [C, H, W] can be shown; ValueError before any is drawn."""
    if shape[0] not in (1, 3):
        raise ValueError(
            f"the images of {model} have {shape[0]} channels, and pictures have 1 or 3: fastdiff.sample draws them "
            "as tensors"
        )


def labels_of(classes: list[str], name: str | None, number: int, offset: int) -> Any:
    """int64 [number], or None for a model without classes."""
    import torch

    if not classes:
        if name is not None:
            raise ValueError(f"--class {name}: this model has no classes")
        return None
    if name is None:
        return (offset + torch.arange(number, device="cpu")) % len(classes)
    if name not in classes:
        raise ValueError(f"--class {name}: the model's classes are {', '.join(classes)}")
    return torch.full((number,), classes.index(name), dtype=torch.int64, device="cpu")
