"""``fastdiff train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.app import command
from fastdiff.cli.arguments import Device, Quiet, Threads, whole_numbers


@command
def train(
    data: Annotated[str, typer.Option(help='"digits" (scikit-learn\'s), or a folder of pictures.')],
    out: Annotated[Path, typer.Option(help="The folder to write the model to.")],
    steps: Annotated[int, typer.Option(help="Training steps in all.")] = 6000,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate (of AdamW).")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of the first weights, the images drawn and the noise.")] = 0,
    size: Annotated[int | None, typer.Option(help="Pixels a side. [default: 8 for digits, 32 for a folder]")] = None,
    channels: Annotated[
        str | None, typer.Option(help="Channels at each resolution, such as 64,128,128. [default: by size]")
    ] = None,
    layers: Annotated[int, typer.Option(help="Residual blocks at each resolution.")] = 1,
    init: Annotated[
        str | None,
        typer.Option(help="A model's folder, to start from its network and weights. [default: drawn by --seed]"),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images, left to right.")] = False,
    label_dropout: Annotated[float, typer.Option(help="Share of labels left out, which --guidance needs.")] = 0.1,
    ema_decay: Annotated[float, typer.Option(help="Share of the averaged weights that a step keeps.")] = 0.999,
    schedule: Annotated[str, typer.Option(help="Schedule of the noise: linear or cosine.")] = "cosine",
    timesteps: Annotated[int, typer.Option(help="Levels of noise in the schedule.")] = 1000,
    prediction: Annotated[
        str, typer.Option(help="What the network learns: epsilon, v_prediction or sample.")
    ] = "epsilon",
    sampler: Annotated[
        str | None,
        typer.Option(help="What the model is sampled by, here and in `fastdiff sample`. [default: ddpm; digits: ddim]"),
    ] = None,
    sampling_steps: Annotated[
        int | None, typer.Option(help="Steps of that sampler. [default: every timestep; digits: 50]")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of those samples. [default: 1, none; digits: 1.15]")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="What the network computes in: float32, bfloat16 (autocast), or auto.")
    ] = "auto",
    device: Device = "auto",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints and grids of samples.")] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in --out; --lr and --steps may be others.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where --out holds a run.")] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out pictures that cannot be read, and list them.")
    ] = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Train a model on a folder of pictures or on digits.

    Algorithm 1 of Ho et al. 2020. It may be killed at any time; Ctrl-C ends the step that is being done and keeps it.
    """
    from fastdiff.ops.native import cpu_threads
    from fastdiff.training.signals import Interrupted
    from fastdiff.training.unet import train_unet

    levels = None if channels is None else tuple(whole_numbers("--channels", channels))
    try:
        with cpu_threads(threads):
            train_unet(
                data, out, steps=steps, batch_size=batch_size, lr=lr, seed=seed, size=size, channels=levels,
                layers=layers, init=init, flip=flip, label_dropout=label_dropout, ema_decay=ema_decay,
                schedule=schedule, timesteps=timesteps, prediction=prediction, sampler=sampler,
                sampling_steps=sampling_steps, guidance=guidance, dtype=dtype, device=device, save_every=save_every,
                resume=resume, overwrite=overwrite, skip_broken=skip_broken, progress=not quiet,
            )  # fmt: skip
    except Interrupted as interrupted:
        if (out / "checkpoint.pt").exists():
            told = f"{interrupted}: the same command with --resume goes on"
            raise Interrupted(told, interrupted.signal) from None
        raise
    if not quiet:
        _tell(out)


def _tell(out: Path) -> None:
    """What there is now, and what to do with it."""
    from fastdiff.files import read_json_object

    classes = read_json_object(out / "training.json")["classes"]
    here = shlex.quote(str(out))
    pictures = sorted((out / "samples").glob("step-*.png"), key=lambda path: (len(path.name), path.name))
    if pictures:
        rows = f", a row each of {', '.join(classes[:16])}{' (the first 16)' * (len(classes) > 16)}" if classes else ""
        typer.echo(f"{pictures[-1]}: samples{rows}")
    one = f" --class {shlex.quote(classes[0])}" if classes else ""
    typer.echo(f"{out}: trained; draw from it with  fastdiff sample --model {here}{one}")
