"""``fastdiff sample`` with a prompt: pictures from words, by a Stable Diffusion checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

TOO_LARGE = 1 << 20  # pixels of a batch where no batch size was asked for


def draw(
    prompts: Sequence[str],
    out: Path,
    *,
    model: Path | None,
    instruction: str | None,
    number: int,
    batch_size: int | None,
    gif: Path | None,
    load: dict[str, Any],
    accelerate: bool | None,
    quiet: bool,
    call: dict[str, Any],
) -> None:
    """Draw ``number`` pictures of each prompt, or of the instruction, into one grid; of several, a labelled row each.

    load: arguments of ``fastdiff.load``; call: of its pipeline. accelerate: None where that is worthwhile.
    """
    import torch

    import fastdiff
    from fastdiff.acceleration.worthwhile import worthwhile
    from fastdiff.images import save_gif

    if instruction is not None and prompts:
        raise ValueError("--instruction goes without prompts: it is what to change in --image")
    lines = list(prompts) if instruction is None else [instruction]
    pipe = fastdiff.load(("emoji" if instruction is None else "emoji-edit") if model is None else model,
                         accelerate=False, **load)  # fmt: skip
    if not isinstance(pipe, fastdiff.Pipeline):
        raise ValueError(f"{model} is a {type(pipe).__name__}, which fastdiff.load hands on; draw with it from Python")
    if instruction is not None and not pipe.edits:
        raise ValueError(f"--instruction needs a checkpoint that edits; {model} draws from prompts")
    if worthwhile(pipe.pipe.unet) if accelerate is None else accelerate:
        pipe.accelerate()

    every = [line for line in lines for _ in range(number)]
    size = batch_size or max(1, TOO_LARGE // (pipe.size or 512) ** 2)
    if gif is not None and len(every) > size:
        raise ValueError(f"--gif shows one batch: {len(every)} pictures must not exceed --batch-size {size}")
    frames: list[torch.Tensor] = []
    first, how = call.pop("sample_offset", 0), {"backend": call.pop("backend", "auto")}
    if gif is not None:
        how["callback"] = lambda state: frames.append(pipe.decode(state.x if state.x0 is None else state.x0).cpu())
    recipe = pipe.recipe(every, batch_size=size, sample_offset=first, **call)
    images = recipe.sample(pipe, progress=not quiet, **how).cpu()
    kept: fastdiff.Recipe | None = recipe
    try:
        recipe.to_json()
    except ValueError as error:
        kept = None
        typer.echo(f"without a recipe in it: {error}", err=True)
    pipe.save(images, out, labels=lines if len(lines) > 1 else (), recipe=kept)
    said = [f"{out}: {len(images)} images of {images.shape[2]}×{images.shape[3]} pixels"]
    if gif is not None:
        save_gif(gif, frames)
        said.append(f"{gif}: the reverse process in {len(frames)} frames")
    if not quiet:
        typer.echo("\n".join(said))
