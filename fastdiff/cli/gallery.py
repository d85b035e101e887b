"""``fastdiff gallery``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.app import command
from fastdiff.cli.arguments import Device, Quiet, Threads

EDITOR = "emoji-edit"


@command
def gallery(
    out: Annotated[Path, typer.Option(help="The folder to write: a new or an empty one, or an earlier gallery.")],
    model: Annotated[str, typer.Option(help='A model that draws from prompts: "emoji", or a folder.')] = "emoji",
    edit_model: Annotated[
        str | None, typer.Option(help=f'One that edits by instruction. [default: "{EDITOR}" where it is installed]')
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two of everything, in four steps.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Write a page of pictures that a model draws, each row with the Python that drew it; open its index.html.

    Prompts in each style, guidance, samplers, edits by instruction, interpolation, image to image, inpainting, and the
    reverse process as a film. The prompts are the emoji's.
    """
    import fastdiff
    from fastdiff.gallery.page import check_pipelines, prepare, write_gallery
    from fastdiff.ops.native import cpu_threads
    from fastdiff.text.load import PACKAGED

    if edit_model is None and model == "emoji" and PACKAGED[EDITOR].exists():
        edit_model = EDITOR
    with cpu_threads(threads):
        pipe = fastdiff.load(model, device=device)
        editor = None if edit_model is None else fastdiff.load(edit_model, device=device)
        check_pipelines(pipe, editor)
        prepare(out)
        loading = [f"pipe = fastdiff.load({model!r})"]
        loading += [] if edit_model is None else [f"editor = fastdiff.load({edit_model!r})"]
        page = write_gallery(
            pipe, out, editor=editor, quick=quick, loading="\n".join(["import torch", "import fastdiff", *loading]),
            told=(lambda title: None) if quiet else typer.echo,
        )  # fmt: skip
    if not quiet:
        typer.echo(f"{page}: {len(list(out.iterdir())) - 1} pictures")
