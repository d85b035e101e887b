"""``fastdiff evaluate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.checks import named_device
from fastdiff.cli.app import command
from fastdiff.cli.arguments import Device, Threads

PART, NUMBER, SEEDS = "held_out", 500, "0,1,2"


@command
def evaluate(
    model: Annotated[
        str | None,
        typer.Option(help='A model that draws by captions: "emoji", or a folder that `fastdiff.load` reads.'),
    ] = None,
    real: Annotated[Path | None, typer.Option(help="A folder of real pictures, to compare with --fake.")] = None,
    fake: Annotated[Path | None, typer.Option(help="A folder of pictures, to compare with --real.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="The folder of tools/emoji.py that judges the model. [default: data/emoji]")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help=f"Whose captions are drawn: train, held_out or held_out_pair. [default: {PART}]")
    ] = None,
    number: Annotated[
        int | None, typer.Option("--number", "--n", "-n", min=1, help=f"Captions of it. [default: {NUMBER}]")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help=f"Of the noise, with commas between; each draws all captions. [default: {SEEDS}]")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. [default: the model's own]")] = None,
    sampler: Annotated[str | None, typer.Option(help="The sampler. [default: the model's own]")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Its steps. [default: the model's own]")] = None,
    pixels_only: Annotated[
        bool, typer.Option("--pixels-only", help="Only the judge in pixels: no EfficientNet and no distances.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(min=1, help="Crop and resize the folders' pictures to this many pixels a side.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write what was found to this JSON file.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the table.")] = False,
) -> None:
    """Judge a text-to-image model, or compare two folders of pictures.

    With --model: samples of captions, each judged by the real picture that it is nearest to, and 95% intervals. With
    --real and --fake: Fréchet distance, KID, precision and recall in EfficientNet-Lite0's features, beside the same
    between two halves of the real pictures. The extra "evaluate" has the network.
    """
    import fastdiff
    from fastdiff.evaluation.distances import table
    from fastdiff.evaluation.features import ImageNetFeatures
    from fastdiff.evaluation.run import compare_folders, evaluate_model
    from fastdiff.files import check_writable
    from fastdiff.ops.native import cpu_threads
    from fastdiff.pictures.network import environment
    from fastdiff.training.captioned import load_captioned
    from fastdiff.training.folder import write_json

    of_model = {"--data": data, "--part": part, "--number": number, "--seeds": seeds, "--guidance": guidance,
                "--sampler": sampler, "--steps": steps, "--pixels-only": pixels_only or None}  # fmt: skip
    if (model is not None and (real or fake)) or (model is None and not (real and fake)):
        raise ValueError("give --model, or both --real and --fake")
    for name, value in (of_model if model is None else {"--size": size}).items():
        if value is not None:
            raise ValueError(f"{name} goes {'with' if model is None else 'without'} --model")
    if out is not None:
        check_writable(out, suffix=".json")
    where = named_device(device)
    with cpu_threads(threads):
        network = None if pixels_only else ImageNetFeatures(device=where)
        if real is not None and fake is not None and network is not None:
            distances = compare_folders(real, fake, network, size=size, progress=not quiet)
            shown, found = table(distances), {name: asdict(each) for name, each in distances.items()}
            asked: dict[str, Any] = {"real": str(real), "fake": str(fake), "size": size}
        else:
            assert model is not None  # asked for above
            how = {"guidance_scale": guidance, "sampler": sampler, "steps": steps}
            how = {name: value for name, value in how.items() if value is not None}
            asked = {"part": part or PART, "n": number or NUMBER, "seeds": _seeds(seeds or SEEDS), **how}
            captioned = load_captioned(data or "emoji", part=None, subset=None)
            pipe = fastdiff.load(str(model), device=where)
            scores = evaluate_model(pipe, captioned, network=network, progress=not quiet, **asked)
            shown, found = str(scores), scores.to_json()
            asked = {"model": model, "data": str(data or "emoji"), **asked}
    typer.echo(shown)
    if out is not None:
        write_json(out, {"asked": asked, "found": found, "environment": environment(where)})


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds must be whole numbers with commas between; got {text!r}") from None
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds names one twice; got {text!r}")
    return seeds
