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
SUFFIXES = (".npz", ".safetensors")


@command
def evaluate(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SET]",
            help="Pictures to compare: a folder of them, of tars, of npz files or of `fastdiff generate`; or one file.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="The real pictures: the same, or what --save wrote of them.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Of what network: efficientnet, digits, module:attribute, a file of TorchScript or torch.export, or a "
            "model's folder. [default: efficientnet]"
        ),
    ] = None,
    subset: Annotated[
        int | None,
        typer.Option(
            min=8, help="Pictures of each set, drawn at random, for KID, precision and recall. [default: 10000]"
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write what is to be known of SET to this .npz or .safetensors, for --against.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help='A model that draws by captions: "emoji", or a folder that `fastdiff.load` reads.'),
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Another spelling of --against.")] = None,
    fake: Annotated[Path | None, typer.Option(help="Another spelling of SET.")] = None,
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
        int | None, typer.Option(min=1, help="Crop and resize all pictures to this many pixels a side.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write what was found to this JSON file.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the table.")] = False,
) -> None:
    """Compare a set of pictures with real ones, or judge a text-to-image model.

    Of SET: Fréchet distance, KID, precision and recall --against the real pictures, beside the same between two halves
    of those. Nothing is downloaded; the extra "evaluate" has EfficientNet-Lite0. With --model: samples of captions,
    each judged by the real picture that it is nearest to, and 95% intervals.
    """
    from fastdiff.files import check_writable
    from fastdiff.ops.native import cpu_threads
    from fastdiff.pictures.network import environment
    from fastdiff.training.folder import write_json

    of_model = {"--data": data, "--part": part, "--number": number, "--seeds": seeds, "--guidance": guidance,
                "--sampler": sampler, "--steps": steps, "--pixels-only": pixels_only or None}  # fmt: skip
    of_sets = {"--against": against or real, "--features": features, "--subset": subset, "--save": save, "--size": size}
    for one, other, name in ((folder, fake, "SET, --fake"), (against, real, "--against, --real")):
        if one is not None and other is not None:
            raise ValueError(f"{name}: they are two spellings of one: give one")
    fakes, reals = folder or fake, against or real
    if (model is None) == (fakes is None):
        raise ValueError("give a set of pictures, --against others, or --model")
    for name, value in (of_model if model is None else of_sets).items():
        if value is not None:
            raise ValueError(f"{name} goes {'with' if model is None else 'without'} --model")
    if model is None and (reals is None) == (save is None):
        raise ValueError("give --against real pictures, or --save a set's statistics")
    if save is not None and save.suffix not in SUFFIXES:
        raise ValueError(f"--save must end in {' or '.join(SUFFIXES)}; got {save}")
    for place, suffix in ((out, ".json"), (save, None)):
        if place is not None:
            check_writable(place, suffix=suffix)
    where = named_device(device)
    with cpu_threads(threads):
        if fakes is not None:
            how = {"size": size, **({} if subset is None else {"subset": subset})}
            found = _sets(fakes, reals, features or "efficientnet", where, save, progress=not quiet, **how)
        else:
            assert model is not None  # asked for above
            changes = {"guidance_scale": guidance, "sampler": sampler, "steps": steps}
            changes = {name: value for name, value in changes.items() if value is not None}
            asked = {"part": part or PART, "n": number or NUMBER, "seeds": _seeds(seeds or SEEDS), **changes}
            found = _model(model, data, asked, where, pixels_only, progress=not quiet)
    if out is not None:
        write_json(out, {**found, "environment": environment(where)})


def _sets(
    fakes: Path, reals: Path | None, features: str, device: Any, save: Path | None, progress: bool, **how: Any
) -> dict[str, Any]:
    from fastdiff.evaluation.against import compare_sets, statistics_of
    from fastdiff.evaluation.distances import table
    from fastdiff.evaluation.extractors import features_of

    network = features_of(features, device)
    asked = {"set": str(fakes), "against": reals and str(reals), "features": features, **how}
    if save is not None:
        statistics = statistics_of(fakes, network, progress=progress, **how)
        statistics.save(save)
        typer.echo(f"{statistics.told}\n{save}: features of {statistics.features}")
        return {"asked": asked, "sets": [statistics.told], "features": str(network.identity)}
    assert reals is not None  # asked for above
    distances, told = compare_sets(fakes, reals, network, progress=progress, **how)
    typer.echo("\n".join([*told, f"features of {network.identity}", "", table(distances)]))
    found = {name: asdict(each) for name, each in distances.items()}
    return {"asked": asked, "sets": told, "features": str(network.identity), "found": found}


def _model(
    model: str, data: Path | None, asked: dict[str, Any], device: Any, pixels_only: bool, progress: bool
) -> dict[str, Any]:
    import fastdiff
    from fastdiff.evaluation.features import ImageNetFeatures
    from fastdiff.evaluation.run import evaluate_model
    from fastdiff.training.captioned import load_captioned

    network = None if pixels_only else ImageNetFeatures(device=device)
    captioned = load_captioned(data or "emoji", part=None, subset=None)
    pipe = fastdiff.load(model, device=device)
    scores = evaluate_model(pipe, captioned, network=network, progress=progress, **asked)
    typer.echo(str(scores))
    return {"asked": {"model": model, "data": str(data or "emoji"), **asked}, "found": scores.to_json()}


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds must be whole numbers with commas between; got {text!r}") from None
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds names one twice; got {text!r}")
    return seeds
