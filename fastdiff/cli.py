"""The command line: ``fastdiff sample``, ``fastdiff plan``, ``fastdiff train``, ``fastdiff info``."""

from __future__ import annotations

import ast
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.samplers import SAMPLERS
from fastdiff.schedules.level import PREDICTIONS
from fastdiff.schedules.spacing import SIGMA_SPACINGS
from fastdiff.schedules.timesteps import SPACINGS

app = typer.Typer(
    name="fastdiff",
    help="Sample images from diffusion models, fast and exactly reproducible.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take "[default: …]" in a help text for markup, and drop it
)

GIF_FRAMES = 60
SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_betas", "edm", "flow")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line on standard error and exit code 2, and whose Ctrl-C is exit code 130."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None

    return app.command()(run)


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
    where = _device(device)
    trained = fastdiff.models.digits() if model is None else fastdiff.models.load(model)
    trained.unet.to(device=where, dtype=getattr(torch, dtype.value))
    labels = _labels(trained.classes, class_name, number, sample_offset)
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


@command
def plan(
    sampler: Annotated[str, typer.Option(help=f"One of {', '.join(SAMPLERS)}.")],
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the sampler. [default: every timestep]"),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help=f"{', '.join(SCHEDULES)}, or a folder that holds a scheduler_config.json.")
    ] = "linear",
    spacing: Annotated[
        str | None,
        typer.Option(help=f"{', '.join((*SPACINGS, *SIGMA_SPACINGS))}. [default: the sampler's or the schedule's]"),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(help=f"What the network predicts: {', '.join(PREDICTIONS)}. [default: epsilon]"),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="Share of noise: 0 is deterministic, 1 is ancestral. [default: the sampler's]"),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE, another argument of the sampler, such as order=3; may be repeated."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw the levels, the coefficients and the noise, as a PNG."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Also write the plan, to be run again by `fastdiff sample --plan` or `Plan.load`."),
    ] = None,
) -> None:
    """Show a sampler as the table of numbers that it is: what each step does to the state."""
    from fastdiff.files import check_writable
    from fastdiff.samplers.resolve import resolve_plan
    from fastdiff.schedules.discrete import NoiseSchedule

    for path, suffix in ((plot, ".png"), (json, ".json")):
        if path is not None:
            check_writable(path, suffix=suffix)
    walked = NoiseSchedule.from_diffusers(schedule) if Path(schedule).is_dir() else schedule
    made = resolve_plan(sampler, steps, walked, prediction, None, spacing, eta, None, _options(option or []))
    told = [str(made)]  # said when the files are there: whom it is said to may have stopped listening
    if plot is not None:
        from fastdiff.plan.plot import save_plot

        told.append(f"{save_plot(made, plot)}: the levels, the coefficients and the noise of {len(made)} rows")
    if json is not None:
        told.append(f"{made.save(json)}: the plan, for  fastdiff sample --plan {json}")
    typer.echo("\n\n".join(told))


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


@command
def info() -> None:
    """Show what was built, what would be chosen for each operation, and why."""
    from fastdiff.info import report

    typer.echo(report())


def _options(given: list[str]) -> dict[str, Any]:
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


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def _labels(classes: list[str], name: str | None, number: int, offset: int) -> Any:
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


if __name__ == "__main__":
    app()
