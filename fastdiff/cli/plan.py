"""``fastdiff plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.app import command
from fastdiff.cli.arguments import SCHEDULES, Option, options, schedule_of
from fastdiff.samplers import SAMPLERS
from fastdiff.schedules.level import PREDICTIONS
from fastdiff.schedules.spacing import NAMES


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
        typer.Option(help=f"{', '.join(NAMES)}. [default: the sampler's or the schedule's]"),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Image tokens, for a folder's flow whose shift depends on the image's size."),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(help=f"What the network predicts: {', '.join(PREDICTIONS)}. [default: the folder's, or epsilon]"),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="Share of noise: 0 is deterministic, 1 is ancestral. [default: the sampler's]"),
    ] = None,
    option: Option = None,
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

    for path, suffix in ((plot, ".png"), (json, ".json")):
        if path is not None:
            check_writable(path, suffix=suffix)
    walked, told_by_folder = schedule_of(schedule, tokens)
    prediction = prediction or told_by_folder
    made = resolve_plan(sampler, steps, walked, prediction, None, spacing, eta, None, options(option or []))
    told = [str(made)]  # said when the files are there: whom it is said to may have stopped listening
    if plot is not None:
        from fastdiff.plan.plot import save_plot

        told.append(f"{save_plot(made, plot)}: the levels, the coefficients and the noise of {len(made)} rows")
    if json is not None:
        told.append(f"{made.save(json)}: the plan, for  fastdiff sample --plan {json}")
    typer.echo("\n\n".join(told))
