"""``fastdiff tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.checks import named_device
from fastdiff.cli.app import command
from fastdiff.cli.arguments import ClassName, Device, Guidance, Model, Quiet, Threads, labels_of, trained_model


@command
def tune(
    steps: Annotated[int, typer.Option(min=1, help="Steps of the plan.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The JSON to write. [default: plans/STEPS.json in the model's folder, or tuned-STEPS.json]"),
    ] = None,
    model: Model = None,
    start: Annotated[str, typer.Option(help="The sampler to start from, one without noise.")] = "dpmpp_2m",
    spacing: Annotated[
        str | None, typer.Option(help="The start's levels. [default: Karras's from σ = 80; a flow's own]")
    ] = None,
    teacher: Annotated[str, typer.Option(help="The sampler that is aimed at, in many steps.")] = "dpmpp_2m",
    teacher_steps: Annotated[
        int | None, typer.Option(min=1, help="Of the teacher. [default: doubled until that changes nothing]")
    ] = None,
    teacher_file: Annotated[
        Path | None,
        typer.Option(help="A .safetensors where the teacher's images are kept, and read again for other --steps."),
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Samples to learn from, a quarter of them held out.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 32,
    iterations: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 160,
    gradient_free: Annotated[
        bool, typer.Option("--gradient-free", help="Learn the levels alone, without gradients (needs cma).")
    ] = False,
    class_name: ClassName = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Also draw the comparison and the levels, as a PNG.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Learn a plan for one model and one number of steps: the quality of many steps in a few.

    Nothing is trained but some ten numbers a step; they aim at where a fine solver leads the same noise. The table says
    how far from that samplers end, in as many network calls, and in twice and four times as many. Ctrl-C ends the
    iterations and keeps the best plan so far. `fastdiff sample --sampler tuned --steps N` draws by it.
    """
    from fastdiff.files import check_writable
    from fastdiff.models.trained import PLANS
    from fastdiff.ops.native import cpu_threads
    from fastdiff.tuning.folder import tune_trained

    if plot is not None:
        check_writable(plot, suffix=".png")
    trained = trained_model(model)
    if out is None and model is not None:
        (model / PLANS).mkdir(exist_ok=True)
    out = out or (Path(f"tuned-{steps}.json") if model is None else model / PLANS / f"{steps}.json")
    check_writable(out, suffix=".json")
    trained.unet.to(named_device(device))
    labels = labels_of(trained.classes, class_name, images, 0)
    options: dict[str, Any] = {
        "start": start, "spacing": spacing, "teacher": teacher, "teacher_steps": teacher_steps,
        "teacher_file": teacher_file, "batch": batch_size, "iterations": iterations, "gradient_free": gradient_free,
        "seed": seed, "progress": not quiet,
    }  # fmt: skip
    with cpu_threads(threads):
        plan = tune_trained(trained, steps=steps, images=images, labels=labels, guidance_scale=guidance, **options)
    plan.save(out)
    told = [str(plan.provenance), f"{out}: the plan, for  fastdiff sample --plan {out}"]
    if plot is not None:
        from fastdiff.tuning.plot import save_plot

        told.append(f"{save_plot(plan, plot)}: the comparison and the levels")
    if not quiet:
        typer.echo("\n\n".join(told))
