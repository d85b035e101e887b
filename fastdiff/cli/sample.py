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
    from tqdm import tqdm

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

    def arguments(begin: int, count: int) -> dict[str, Any]:
        chosen = None if labels is None else labels[begin : begin + count].to(where)
        told = trained.arguments(chosen, guidance, **changes)
        return {**told, "seed": seed, "sample_offset": sample_offset + begin, "backend": backend}

    frames: list[torch.Tensor] = []
    if gif is not None:
        states = list(
            fastdiff.sample_iter(trained.unet, (number, *trained.image_shape), progress=True, **arguments(0, number))
        )
        every = max(1, len(states) // GIF_FRAMES)
        frames = [state.x for state in states[::-every]][::-1]
        images = states[-1].x
    else:
        batches = []
        starts = range(0, number, batch_size)
        for begin in tqdm(starts, unit="batch") if len(starts) > 1 else starts:
            count = min(batch_size, number - begin)
            shape = (count, *trained.image_shape)
            batches.append(
                fastdiff.sample(trained.unet, shape, progress=len(starts) == 1, **arguments(begin, count)).cpu()
            )
        images = torch.cat(batches)
    save_grid(out, images)
    typer.echo(f"{out}: {number} images of {'×'.join(str(s) for s in trained.image_shape[1:])} pixels")
    if gif is not None:
        save_gif(gif, frames)
        typer.echo(f"{gif}: the reverse process in {len(frames)} frames")
