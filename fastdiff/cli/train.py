"""``fastdiff train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.app import command


@command
def train(
    data: Annotated[str, typer.Option(help='"digits" (scikit-learn\'s), or a folder of pictures.')],
    out: Annotated[Path, typer.Option(help="The folder to write the model to.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 6000,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of the first weights, the images drawn and the noise.")] = 0,
    size: Annotated[
        int | None,
        typer.Option(help="Pixels a side. [default: 8 for digits, 32 for a folder]"),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(help="Of each level, such as 64,128,128. [default: by size]"),
    ] = None,
    layers: Annotated[int, typer.Option(help="Residual blocks of a level.")] = 1,
    label_dropout: Annotated[float, typer.Option(help="Share of labels dropped, for guidance.")] = 0.1,
    ema_decay: Annotated[float, typer.Option(help="Decay a step of the averaged weights.")] = 0.999,
    schedule: Annotated[str, typer.Option(help="linear or cosine.")] = "cosine",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16 (autocast).")] = "auto",
    device: Annotated[str, typer.Option(help="What torch calls it, or auto.")] = "auto",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints and grids of samples.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Train a DDPM on a folder of pictures or on handwritten digits (Ho et al. 2020, Algorithm 1)."""
    from fastdiff.training.train import train as run

    levels = None
    if channels is not None:
        try:
            levels = tuple(int(part) for part in channels.split(","))
        except ValueError:
            raise ValueError(f"--channels must be numbers with commas between; got {channels!r}") from None
    try:
        run(
            data, out, steps=steps, batch_size=batch_size, lr=lr, seed=seed, size=size, channels=levels, layers=layers,
            label_dropout=label_dropout, ema_decay=ema_decay, schedule=schedule, dtype=dtype, device=device,
            save_every=save_every, resume=resume,
        )  # fmt: skip
    except KeyboardInterrupt:
        if (out / "checkpoint.pt").exists():
            typer.echo(f"{out} holds the last checkpoint: the same command with --resume goes on from it", err=True)
        raise
    typer.echo(f"{out}: trained; draw from it with  fastdiff sample --model {out}")
