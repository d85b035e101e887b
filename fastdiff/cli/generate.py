"""``fastdiff generate`` and ``fastdiff verify``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.app import FAILED, command
from fastdiff.cli.arguments import (
    SCHEDULES,
    Device,
    DType,
    Guidance,
    Option,
    Quiet,
    Threads,
    options,
    schedule_of,
)
from fastdiff.cli.sample import Accelerate

GO_ON = 75  # EX_TEMPFAIL: ended by a signal, and the same command goes on


class Format(str, Enum):
    tar = "tar"
    png = "png"
    npz = "npz"


@command
def generate(
    out: Annotated[
        str, typer.Option(help="The set's folder, which is made; or an s3://, gs:// or az:// URL (the extra stores).")
    ],
    num: Annotated[
        int | None,
        typer.Option("--num", "--number", "-n", help="How many images the set has. [default: as many as --prompts]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder written by `fastdiff train` or diffusers; with --prompts also one file of a checkpoint. "
            "[default: the digits in the package, or the emoji]"
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="balanced, or a file with a class a line. [default: balanced, where there are classes]"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with a prompt a line, one an image, for a model that draws from words.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="With --prompts: what to keep away from.")] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="With --prompts: pixels along a side. [default: the model's own]")
    ] = None,
    guidance: Guidance = None,
    sampler: Annotated[
        str | None, typer.Option(help="Any sampler that `fastdiff plan` lists. [default: the model's own, or ddpm]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the sampler. [default: the model's own]")] = None,
    eta: Annotated[float | None, typer.Option(help="How much new noise steps add. [default: the model's own]")] = None,
    spacing: Annotated[
        str | None, typer.Option(help="Where the steps lie, such as karras. [default: the model's own]")
    ] = None,
    option: Option = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(SCHEDULES)}, or a folder with a scheduler_config.json. [default: the model's own]"
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan that `fastdiff plan --json` wrote.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise: the set is images 0 to num - 1 of this seed.")] = 0,
    shard_size: Annotated[int, typer.Option(help="Images a shard.")] = 1024,
    batch_size: Annotated[
        int | None, typer.Option(help="Images at a time; it divides --shard-size. [default: the fastest]")
    ] = None,
    format: Annotated[
        Format, typer.Option(help="Shards are tars (WebDataset), folders of PNGs, or NumPy's npz.")
    ] = Format.tar,
    recipes: Annotated[
        bool, typer.Option("--recipes/--no-recipes", help="Keep in each PNG how it was made, some kilobytes.")
    ] = True,
    device: Device = "auto",
    dtype: Annotated[DType, typer.Option(help="What the network computes in.")] = DType.float32,
    accelerate: Annotated[
        Accelerate,
        typer.Option(help="The network's fast path: on, off, or auto: for networks of a million weights and more."),
    ] = Accelerate.auto,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant", help="The same bits of an image in batches of any size, and some percent slower."
        ),
    ] = False,
    rank: Annotated[
        int | None, typer.Option(help="Which process this is. [default: as torchrun, SLURM or Kubernetes say]")
    ] = None,
    world_size: Annotated[int | None, typer.Option(help="How many processes there are. [default: as they say]")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Make it in so many processes of this machine, or actors of Ray's.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="In a process, or actor, for each of so many GPUs; all: for every one.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="ray: actors of a Ray cluster (the extra ray). [default: processes]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make nothing: say what is missing, and what it would take.")
    ] = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Draw thousands of images into a folder, in shards, on one machine or many.

    What ends a run costs at most a batch: the same command again makes what is missing. Each image is what `fastdiff
    sample` draws under its number. Exit codes: 0, the set is whole; 1, shards could not be made; 75, a signal ended it.
    """
    import torch

    import fastdiff
    from fastdiff.ops.native import cpu_threads
    from fastdiff.training.signals import Interrupted

    changes: dict[str, Any] = {"sampler": sampler, "steps": steps, "eta": eta, "spacing": spacing}
    changes = {name: value for name, value in changes.items() if value is not None}
    if option:
        changes["sampler_options"] = options(option)
    if schedule is not None:
        changes["schedule"], prediction = schedule_of(schedule)
        changes |= {} if prediction is None else {"prediction": prediction}
    if plan is not None:
        if changes:
            raise ValueError(f"--plan fixes what is given beside it: {', '.join(changes)}")
        changes["sampler"] = fastdiff.Plan.load(plan)
    changes |= {name: value for name, value in (("negative_prompt", negative), ("size", size)) if value is not None}
    try:
        with cpu_threads(threads):
            made = fastdiff.generate(
                model, num, out, labels=labels, prompts=prompts, guidance_scale=guidance, seed=seed,
                shard_size=shard_size, batch_size=batch_size, format=format.value, recipes=recipes, device=device,
                dtype=getattr(torch, dtype.value), accelerate={"on": True, "off": False}.get(accelerate.value),
                batch_invariant=batch_invariant, rank=rank, world_size=world_size, workers=workers,
                gpus=int(gpus) if gpus is not None and gpus.isdecimal() else gpus, engine=engine, dry_run=dry_run,
                progress=not quiet, **changes,
            )  # fmt: skip
    except Interrupted as interrupted:
        typer.echo(str(interrupted), err=True)
        raise SystemExit(GO_ON) from None
    if made.failed or not quiet:
        typer.echo(str(made), err=bool(made.failed))
    if made.failed:
        raise SystemExit(FAILED)


@command
def verify(
    folder: Annotated[str, typer.Argument(help="A folder, or URL, that `fastdiff generate` wrote.")],
    remake: Annotated[int, typer.Option(min=0, help="Make so many batches again, evenly spread, and compare.")] = 0,
    discard: Annotated[
        bool, typer.Option("--discard", help="Remove damaged shards, so that `fastdiff generate` makes them again.")
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="The model's folder or file. [default: as it was named then]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to make them again. [default: where the set was begun, or the CPU]")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Check every image of a set against its hash, and make some again.

    The exit code is 0 where all images are there and right, else 1.
    """
    from fastdiff.checks import named_device
    from fastdiff.generation.verify import verify as run

    found = run(
        folder,
        remake=remake,
        discard=discard,
        model=model,
        device=None if device is None else str(named_device(device)),
    )
    if not (quiet and found.right):
        typer.echo(str(found))
    if not found.right:
        raise SystemExit(FAILED)
