"""``fastdiff sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.app import command
from fastdiff.cli.arguments import DType, device_of, labels_of

GIF_FRAMES = 60


@command
def sample(
    out: Annotated[Path, typer.Option(help="The PNG to write, a grid of the images.")] = Path("samples.png"),
    model: Annotated[
        Path | None,
        typer.Option(help="A folder written by `fastdiff train` or diffusers. [default: the digits in the package]"),
    ] = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many images.")] = 64,
    class_name: Annotated[
        str | None,
        typer.Option("--class", help="One class for all images, by name. [default: all classes in turn]"),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance scale; 1 is none. [default: the model's own]"),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="Any sampler that `fastdiff plan` lists. [default: the model's own, or ddpm]"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the sampler. [default: the model's own, or every timestep]"),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="Share of noise: 0 is deterministic, 1 is ancestral. [default: the model's or sampler's]"),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan that `fastdiff plan --json` wrote, in place of --sampler, --steps and --eta."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i of a seed is the same image in every batch.")] = 0,
    sample_offset: Annotated[int, typer.Option(min=0, help="The number of the first image.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    device: Annotated[str, typer.Option(help="What torch calls it, or auto: the GPU where there is one.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="What the network computes in.")] = DType.float32,
    backend: Annotated[str, typer.Option(help="auto, native, triton or reference.")] = "auto",
    gif: Annotated[
        Path | None,
        typer.Option(help="Also write the reverse process as a GIF (one batch at most)."),
    ] = None,
) -> None:
    """Draw images from a trained model; without options, 64 digits into samples.png."""
    import torch

    import fastdiff
    from fastdiff.images import check_writable, save_gif, save_grid

    check_writable(out, suffix=".png")
    if gif is not None:
        check_writable(gif, suffix=".gif")
        if number > batch_size:
            raise ValueError(f"--gif shows one batch: --number {number} must not exceed --batch-size {batch_size}")
    where = device_of(device)
    trained = fastdiff.models.digits() if model is None else fastdiff.models.load(model)
    trained.unet.to(device=where, dtype=getattr(torch, dtype.value))
    labels = labels_of(trained.classes, class_name, number, sample_offset)
    if labels is None and guidance not in (None, 1.0):
        raise ValueError("--guidance needs a class-conditional model; this one has no classes")
    changes: dict[str, Any] = {"sampler": sampler, "steps": steps, "eta": eta}
    changes = {name: value for name, value in changes.items() if value is not None}
    if plan is not None:
        if changes:
            raise ValueError(f"--plan goes without {', '.join(f'--{name}' for name in changes)}, which the plan fixes")
        trained.sampling = {"sampler": fastdiff.Plan.load(plan)}

    told = trained.arguments(None if labels is None else labels.to(where), guidance, **changes)
    shape = (number, *trained.image_shape)
    recipe = fastdiff.Recipe.of(
        trained.unet, shape, batch_size=batch_size, seed=seed, sample_offset=sample_offset, **told
    )
    kept: fastdiff.Recipe | None = recipe
    try:
        recipe.to_json()
    except ValueError as error:
        kept = None
        typer.echo(f"without a recipe in it: {error}", err=True)
    frames: list[fastdiff.State] = []
    if gif is not None:
        every = max(1, (len(recipe.plan) + 1) // GIF_FRAMES)
        for state in recipe.states(trained.unet, backend=backend, progress=True):
            if (len(recipe.plan) - state.row) % every == 0:
                frames.append(state)
        images = frames[-1].x
    else:
        images = recipe.sample(trained.unet, backend=backend, progress=True)
    save_grid(out, images, recipe=kept)
    typer.echo(f"{out}: {number} images of {'×'.join(str(s) for s in trained.image_shape[1:])} pixels")
    if gif is not None:
        save_gif(gif, frames, recipe=kept)
        typer.echo(f"{gif}: the reverse process in {len(frames)} frames")
