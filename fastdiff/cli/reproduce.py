"""``fastdiff reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastdiff.checks import named_device
from fastdiff.cli.app import command
from fastdiff.cli.arguments import Quiet


@command
def reproduce(
    picture: Annotated[Path, typer.Argument(help="A PNG or GIF that `fastdiff sample` wrote.")],
    model: Annotated[
        Path | None, typer.Option(help="The model's folder. [default: the one that the picture names]")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where to compute: cpu, cuda …. [default: the GPU where the picture was made on one, or else the CPU]"
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=4096, help="Threads of the CPU. [default: as many as then, if there are so many cores]"
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Make a picture again by the recipe in it, and compare the two.

    The exit code is 0 where all pixels are the same, else 1.
    """
    from fastdiff.pictures.reproduce import reproduce as run

    where = None if device is None else named_device(device)
    made = run(picture, model, device=where, threads=threads, progress=not quiet)
    if not quiet:
        typer.echo(str(made))
    if not made.identical:
        raise SystemExit(1)
