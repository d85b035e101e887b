"""``fastdiff compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.checks import named_device
from fastdiff.cli.app import command
from fastdiff.cli.arguments import (
    ClassName,
    Device,
    Guidance,
    Model,
    Quiet,
    Threads,
    check_pictures,
    labels_of,
    trained_model,
    whole_numbers,
)

FINE = 100  # steps of the solution that others are measured against


@command
def compare(
    samplers: Annotated[str, typer.Option(help="Samplers, with commas between: a row each.")] = "ddim,dpmpp_2m,unipc",
    steps: Annotated[str, typer.Option(help="Numbers of steps with commas between: a column each.")] = "5,10,20",
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("compare.png"),
    model: Model = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Images in each place.")] = 4,
    class_name: ClassName = None,
    guidance: Guidance = None,
    spacing: Annotated[
        str | None, typer.Option(help="Where the steps lie, such as trailing or karras. [default: the model's own]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise, which is the same in every place.")] = 0,
    fine: Annotated[
        int, typer.Option(min=0, help="Steps of the fine solution, by DPM-Solver++(2M); 0 leaves the distances out.")
    ] = FINE,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Compare samplers and numbers of steps in one picture.

    All begin with the same noise. Under each place: the network calls, and the distance (root mean square over all
    pixels, which lie in [-1, 1]) from a fine solution of the same differential equation, for samplers that add no noise
    of their own.
    """
    import torch
    from tqdm.auto import tqdm

    import fastdiff
    from fastdiff.files import atomic_write, check_writable
    from fastdiff.images import make_grid
    from fastdiff.ops.native import cpu_threads
    from fastdiff.pictures.recipe import IN_THE_PLAN
    from fastdiff.plots.strips import labelled
    from fastdiff.samplers.resolve import resolve_plan

    check_writable(out, suffix=".png")
    names, counts = [word.strip() for word in samplers.split(",")], whole_numbers("--steps", steps)
    if not all(names):
        raise ValueError(f"--samplers must be words with commas between; got {samplers!r}")
    where = named_device(device)
    trained = trained_model(model)
    check_pictures(trained.image_shape, model)
    trained.unet.to(where, torch.float32)
    labels = labels_of(trained.classes, class_name, number, 0)
    shape = (number, *trained.image_shape)

    changes = {} if spacing is None else {"spacing": spacing}

    def planned(sampler: str, count: int) -> dict[str, Any]:
        """The arguments of a run, its plan among them."""
        chosen = None if labels is None else labels.to(where)
        told = trained.arguments(chosen, guidance, sampler=sampler, steps=count, **changes)
        fixed = {name: told.pop(name) for name in IN_THE_PLAN if name in told}
        return {**told, "sampler": resolve_plan(**fixed), "seed": seed}

    runs = [[planned(sampler, count) for count in counts] for sampler in names]  # refused before any work
    solution = planned("dpmpp_2m", fine) if fine else None
    every = [run for row in runs for run in row] + ([] if solution is None else [solution])
    bar = tqdm(total=sum(_calls(run["sampler"]) for run in every), unit="call", disable=quiet)

    def drawn(run: dict[str, Any]) -> Any:
        images = fastdiff.sample(trained.unet, shape, **run)
        bar.update(_calls(run["sampler"]))
        return images

    cells, captions = [], []
    with bar, cpu_threads(threads):
        exact = None if solution is None else drawn(solution)
        for row in runs:
            images = [drawn(run) for run in row]
            cells.append([make_grid(batch) for batch in images])
            captions.append([_caption(run["sampler"], batch, exact) for run, batch in zip(row, images, strict=True)])
    note = f"distance: from {fine} steps of dpmpp_2m" if fine else ""
    picture = labelled(cells, names, [f"{count} steps" for count in counts], captions, note)
    with atomic_write(out) as file:
        picture.save(file, format="PNG")
    if not quiet:
        typer.echo(f"{out}: {len(names)} samplers at {', '.join(map(str, counts))} steps, {number} images each")


def _calls(plan: Any) -> int:
    return sum(row.runs_network for row in plan)


def _caption(plan: Any, images: Any, exact: Any) -> str:
    told = f"{_calls(plan)} calls"
    if exact is None or any(row.uses("z") for row in plan):
        return told
    return f"{told}, {(images - exact).square().mean().sqrt().item():.3f}"
