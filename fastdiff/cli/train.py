"""``fastdiff train``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.app import command
from fastdiff.cli.arguments import Device, Quiet, Threads, whole_numbers


@command
def train(
    data: Annotated[
        str,
        typer.Option(help='"digits" (scikit-learn\'s), "emoji", or a folder of pictures, in classes or with captions.'),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write the model to.")],
    steps: Annotated[
        int | None, typer.Option(help="Training steps in all. [default: 6000; with captions: 6400; edits: 13000]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step. [default: 64; with captions or edits: 32]")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate (of AdamW). [default: 2e-3; with captions or edits: 1e-3]")
    ] = None,
    cooldown: Annotated[
        float | None,
        typer.Option(help="Share of the steps, the last, over which the rate falls to 0. [default: 0; captions: 0.4]"),
    ] = None,
    autoencoder_steps: Annotated[
        int | None, typer.Option(help="Of the first stage, with captions. [default: 2000]")
    ] = None,
    decoder_steps: Annotated[
        int | None, typer.Option(help="Of the decoder of --init alone, which come first, with captions. [default: 0]")
    ] = None,
    edits: Annotated[
        bool, typer.Option("--edits", help="Train an editor by instruction, from the pipeline in --init.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the first weights, the images drawn and the noise.")] = 0,
    size: Annotated[
        int | None, typer.Option(help="Pixels a side. [default: 8 for digits, 32 for a folder, 64 with captions]")
    ] = None,
    channels: Annotated[
        str | None, typer.Option(help="Channels at each resolution, such as 64,128,128. [default: by size]")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Residual blocks at each resolution. [default: 1]")] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="A model's folder, or emoji or emoji-edit, to start from its weights. [default: drawn by --seed]"
        ),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images, left to right.")] = False,
    label_dropout: Annotated[float, typer.Option(help="Share of labels left out, which --guidance needs.")] = 0.1,
    ema_decay: Annotated[float, typer.Option(help="Share of the averaged weights that a step keeps.")] = 0.999,
    schedule: Annotated[
        str | None, typer.Option(help="Schedule of the noise: linear or cosine. [default: cosine]")
    ] = None,
    timesteps: Annotated[int | None, typer.Option(help="Levels of noise in the schedule. [default: 1000]")] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            help="What the network learns: epsilon, v_prediction or sample. [default: epsilon; with captions: "
            "v_prediction]"
        ),
    ] = None,
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
    tune: Annotated[
        str | None,
        typer.Option(help="Then learn the model's plans of so many steps, such as 4,6,8: see `fastdiff tune`."),
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Train a model on a folder of pictures, on emoji and their captions, or on digits.

    Algorithm 1 of Ho et al. 2020; with captions, on the latents of an autoencoder that is trained first (Rombach et al.
    2022). It may be killed at any time; Ctrl-C ends the step that is being done and keeps it.
    """
    from fastdiff.ops.native import cpu_threads
    from fastdiff.training.settings import Settings
    from fastdiff.training.signals import Interrupted

    asked: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "cooldown": cooldown, "seed": seed, "size": size,
        "autoencoder_steps": autoencoder_steps, "decoder_steps": decoder_steps, "layers": layers,
        "init": init, "flip": flip or None,
        "channels": None if channels is None else tuple(whole_numbers("--channels", channels)),
        "label_dropout": label_dropout, "ema_decay": ema_decay, "schedule": schedule, "timesteps": timesteps,
        "prediction": prediction, "sampler": sampler, "sampling_steps": sampling_steps, "guidance": guidance,
        "dtype": dtype, "device": device, "save_every": save_every, "skip_broken": skip_broken or None,
    }  # fmt: skip
    asked = {name: value for name, value in asked.items() if value is not None}
    if edits and init is None:
        raise ValueError("--edits needs --init, the folder of the pipeline that the editor starts from")
    counts = [] if tune is None else whole_numbers("--tune", tune)
    run, kind = _trainer(data, edits)
    unknown = sorted(set(asked) - {field.name for field in fields(kind)})
    if unknown:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise ValueError(f"{told} is not for {'edits' if edits else data!r}: see the lines of --help that name it")
    if counts and kind is not Settings:
        raise ValueError("--tune is for models of classes or of pictures alone; fastdiff.tune takes any network")
    try:
        with cpu_threads(threads):
            run(data, out, resume=resume, overwrite=overwrite, progress=not quiet, **asked)
    except Interrupted as interrupted:
        if (out / "checkpoint.pt").exists() or (out / "autoencoder" / "checkpoint.pt").exists():
            told = f"{interrupted}: the same command with --resume goes on"
            raise Interrupted(told, interrupted.signal) from None
        raise
    if counts:
        from fastdiff.tuning.folder import tune_folder

        with cpu_threads(threads):
            tune_folder(out, counts, progress=not quiet)
    if not quiet:
        _tell(out)


def _trainer(data: str, edits: bool) -> tuple[Callable[..., Path], type]:
    """What trains on these data, and its settings."""
    from fastdiff.training.captioned import is_captioned

    if edits or is_captioned(data):
        from fastdiff.training import pipeline

        if edits:
            return pipeline.train_editor, pipeline.EditSettings
        return pipeline.train_pipeline, pipeline.TextSettings
    from fastdiff.training.settings import Settings
    from fastdiff.training.unet import train_unet

    return train_unet, Settings


def _tell(out: Path) -> None:
    """What there is now, and what to do with it."""
    from fastdiff.files import read_json_object

    classes = read_json_object(out / "training.json").get("classes", [])
    here = shlex.quote(str(out))
    pictures = sorted((out / "samples").glob("step-*.png"), key=lambda path: (len(path.name), path.name))
    if pictures:
        rows = f", a row each of {', '.join(classes[:16])}{' (the first 16)' * (len(classes) > 16)}" if classes else ""
        typer.echo(f"{pictures[-1]}: samples{rows}")
    one = f" --class {shlex.quote(classes[0])}" if classes else ""
    index = out / "model_index.json"
    words = ' "a caption"' * index.exists()
    if index.exists() and "Pix2Pix" in read_json_object(index)["_class_name"]:
        words = ' --instruction "what to change" --image PICTURE'
    typer.echo(f"{out}: trained; draw from it with  fastdiff sample{words} --model {here}{one}")
