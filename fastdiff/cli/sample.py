"""``fastdiff sample``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiff.checks import named_device
from fastdiff.cli.app import command
from fastdiff.cli.arguments import (
    SCHEDULES,
    ClassName,
    Device,
    DType,
    Guidance,
    Option,
    Quiet,
    Threads,
    check_pictures,
    labels_of,
    options,
    schedule_of,
    trained_model,
)
from fastdiff.cli.text import draw

if TYPE_CHECKING:
    from torch import Tensor

    from fastdiff.models.trained import TrainedModel
    from fastdiff.sampling.state import State

BATCH = 64
NUMBER, BETWEEN = 64, 9  # images, and images between two pictures, where no number is asked for
GIF_FRAMES = 60
STRENGTH = 0.6  # of image to image


class Accelerate(str, Enum):
    auto = "auto"
    on = "on"
    off = "off"


@command
def sample(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="What to draw, in words; several make a labelled grid. Without one: the model's classes."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write, a grid of the images.")] = Path("samples.png"),
    gif: Annotated[
        Path | None, typer.Option(help="Also write the images as they form, from noise on, as a GIF (of one batch).")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A folder written by `fastdiff train` or diffusers; with a prompt also one file of a checkpoint. "
            "[default: the digits in the package, or the emoji]"
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option("--number", "-n", min=1, help=f"How many images, or of each prompt. [default: {NUMBER}, or 1]"),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="With a prompt: what to keep away from.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What to change in --image, in words, by a model that edits.")
    ] = None,
    image_guidance: Annotated[
        float | None, typer.Option(help="With --instruction: how closely to keep to --image. [default: the model's]")
    ] = None,
    guidance_order: Annotated[
        str | None, typer.Option(help="With --instruction: what comes first, image or words. [default: the model's]")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="With a prompt: pixels along a side. [default: the model's own]")
    ] = None,
    class_name: ClassName = None,
    guidance: Guidance = None,
    sampler: Annotated[
        str | None, typer.Option(help="Any sampler that `fastdiff plan` lists. [default: the model's own, or ddpm]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the sampler. [default: the model's own, or every timestep]")
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="How much new noise steps add: 0 is none, 1 DDPM's. [default: the model's or sampler's]"),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="Where the sampler's steps lie, such as trailing or karras. [default: the model's own]"),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Bound of the predicted image's values, such as 1, or none. [default: the model's own]"),
    ] = None,
    option: Option = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(SCHEDULES)}, or a folder with a scheduler_config.json. [default: the model's own]"
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan that `fastdiff plan --json` wrote, in place of a sampler and its options."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture to start from (image to image), or to fill in (with --mask).")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help=f"How much of --image is drawn anew, 0 to 1. [default: {STRENGTH}; with --mask: all that is not kept]"
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A picture: where it is white --image is kept, where black drawn anew.")
    ] = None,
    interpolate: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help=f"Draw images between two pictures, in a row. [default number: {BETWEEN}]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise; image i of a seed is the same in every batch.")] = 0,
    sample_offset: Annotated[int, typer.Option(min=0, help="Number of the first image, to split a large job.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at a time. [default: 64; with a prompt, a million pixels]")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[DType, typer.Option(help="What the network computes in.")] = DType.float32,
    accelerate: Annotated[
        Accelerate,
        typer.Option(help="The network's fast path: on, off, or auto: for networks of a million weights and more."),
    ] = Accelerate.auto,
    backend: Annotated[
        str, typer.Option(help="Whose kernels: native (C++, CUDA), triton, reference (PyTorch), or auto.")
    ] = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Draw images from a trained model, or pictures from words.

    Without options: 64 digits, from the model in the package, into samples.png. With a prompt, --model is a Stable
    Diffusion checkpoint, a folder or one file, and by default the model in the package that draws emoji.
    """
    import torch

    import fastdiff
    from fastdiff.acceleration.worthwhile import accelerated
    from fastdiff.images import check_writable, save_gif, save_grid
    from fastdiff.ops.native import cpu_threads
    from fastdiff.sampling.interpolate import run_between

    check_writable(out, suffix=".png")
    if gif is not None:
        check_writable(gif, suffix=".gif")
    changes: dict[str, Any] = {"sampler": sampler, "steps": steps, "eta": eta, "spacing": spacing, "schedule": schedule}
    changes = {name: value for name, value in changes.items() if value is not None}
    if clip is not None:
        changes["clip"] = _bound(clip)
    if option:
        changes["sampler_options"] = options(option)
    if plan is not None and changes:
        raise ValueError(f"--plan goes without {_names(changes)}, which the plan fixes")
    if (strength is not None or mask is not None) and image is None:
        raise ValueError(f"--{'mask' if mask is not None else 'strength'} needs --image")
    force = {Accelerate.on: True, Accelerate.off: False}.get(accelerate)
    if prompt or instruction is not None:
        given = {name for name, value in (("class", class_name), ("interpolate", interpolate)) if value is not None}
        if given:
            raise ValueError(f"a prompt goes without {_names(sorted(given))}")
        if plan is not None:
            changes["sampler"] = fastdiff.Plan.load(plan)
        if schedule is not None:
            changes["schedule"], prediction = schedule_of(schedule)
            changes |= {} if prediction is None else {"prediction": prediction}
        told = {"negative_prompt": negative, "image": image, "mask": mask, "strength": strength, "size": size,
                "guidance_scale": guidance, "image_guidance_scale": image_guidance, **changes, "seed": seed,
                "guidance_order": guidance_order, "sample_offset": sample_offset, "backend": backend}  # fmt: skip
        with cpu_threads(threads):
            draw(prompt or (), out, model=model, instruction=instruction, number=number or 1, batch_size=batch_size,
                 gif=gif, load={"device": device, "dtype": getattr(torch, dtype.value)}, accelerate=force, quiet=quiet,
                 call=told)  # fmt: skip
        return
    of_words = {"negative": negative, "image-guidance": image_guidance, "guidance-order": guidance_order, "size": size}
    for name, value in of_words.items():
        if value is not None:
            raise ValueError(f"--{name} needs a prompt")
    batch_size = BATCH if batch_size is None else batch_size
    if interpolate is not None:
        others = {"plan": plan, "image": image, "gif": gif, "sample_offset": sample_offset or None}
        given = {name for name in others if others[name] is not None} | (set(changes) - {"clip", "schedule"})
        if given:
            raise ValueError(f"--interpolate goes without {_names(sorted(given))}")
    count = number or (NUMBER if interpolate is None else BETWEEN)
    if (gif is not None or interpolate is not None) and count > batch_size:
        name = "--gif shows" if gif is not None else "--interpolate draws"
        raise ValueError(f"{name} one batch: --number {count} must not exceed --batch-size {batch_size}")

    where, kind = named_device(device), getattr(torch, dtype.value)
    trained = trained_model(model)
    check_pictures(trained.image_shape, model)
    trained.unet.to(device=where, dtype=kind)
    labels = labels_of(trained.classes, class_name, count, sample_offset)
    if labels is None and guidance not in (None, 1.0):
        raise ValueError("--guidance needs a class-conditional model; this one has no classes")
    if plan is not None:
        trained.sampling = {"sampler": fastdiff.Plan.load(plan)}
    if schedule is not None:
        changes["schedule"], prediction = schedule_of(schedule)
        if prediction is not None:
            changes["prediction"] = prediction
    more = changes.pop("sampler_options", {})  # beside the folder's
    begins: dict[str, Any] = {}  # where the images start from, [1, C, H, W]
    if image is not None:
        begins["known" if mask is not None else "x_init"] = _picture(image, trained).to(where)
        if mask is not None:
            begins["mask"] = (_picture(mask, trained, grey=True).to(where) + 1) / 2
            if strength is not None:
                begins["x_init"] = begins["known"]
        if "x_init" in begins:
            begins["strength"] = STRENGTH if strength is None else strength

    def arguments(count: int) -> dict[str, Any]:
        told = trained.arguments(None if labels is None else labels.to(where), guidance, **changes)
        if more:
            told["sampler_options"] = told.get("sampler_options", {}) | more
        starts = {name: value.expand(count, -1, -1, -1) if name != "strength" else value
                  for name, value in begins.items()}  # fmt: skip
        return {**told, **starts, "seed": seed, "sample_offset": sample_offset}

    frames: list[State] = []
    kept: fastdiff.Recipe | None = None
    how: dict[str, Any] = {"backend": backend, "progress": not quiet}
    with cpu_threads(threads), accelerated(trained.unet, kind, force=force):
        if interpolate is not None:
            a, b = (_picture(path, trained)[0].to(where) for path in interpolate)
            chosen = labels.to(where) if labels is not None and class_name is not None else None
            told = _between(trained, chosen, guidance, changes)
            weights = [i / max(1, count - 1) for i in range(count)]
            shape, told = run_between(trained.unet, a, b, weights, seed=seed, **told)
        else:
            shape, told = (count, *trained.image_shape), arguments(count)
        recipe = fastdiff.Recipe.of(trained.unet, shape, batch_size=batch_size, **told)
        try:
            recipe.to_json()
            kept = recipe
        except ValueError as error:
            typer.echo(f"without a recipe in it: {error}", err=True)
        if gif is not None:
            frames, images = film(recipe.states(trained.unet, **how))
        else:
            images = recipe.sample(trained.unet, **how)
    save_grid(out, images, columns=None if interpolate is None else count, recipe=kept)
    said = [f"{out}: {count} images of {'×'.join(str(s) for s in trained.image_shape[1:])} pixels"]
    if gif is not None:
        save_gif(gif, frames, recipe=kept)
        said.append(f"{gif}: the reverse process in {len(frames)} frames")
    if not quiet:
        typer.echo("\n".join(said))


def film(states: Iterable[State]) -> tuple[list[State], Tensor]:
    """At most some 60 states of a run, evenly spaced, the first and the last among them; and the last one's images.

    No more than those are held, however many there are, and of each only what is shown.
    """
    frames: list[State] = []
    every, row = 1, 0
    for row, state in enumerate(states):
        if row % every == 0:
            frames.append(_shown(state))
        if len(frames) > GIF_FRAMES:
            frames, every = frames[::2], 2 * every
    if row % every:
        frames.append(_shown(state))
    return frames, state.x


def _shown(state: State) -> State:
    return replace(state, x=state.x.cpu(), x0=None, anchor=None, slots=())


def _names(arguments: Iterable[str]) -> str:
    """Arguments as the command line writes them."""
    return ", ".join("--" + {"sampler_options": "option"}.get(name, name).replace("_", "-") for name in arguments)


def _bound(clip: str) -> float | None:
    if clip.lower() == "none":
        return None
    try:
        return float(clip)
    except ValueError:
        raise ValueError(f"--clip must be a number, or none; got {clip!r}") from None


def _picture(path: Path, trained: TrainedModel, *, grey: bool = False) -> Tensor:
    """A picture cropped and resized as the model's are, float32 [1, C, H, W] in [-1, 1]; C is 1 for a grey one."""
    from fastdiff.training.pictures import read_picture

    channels, height, width = trained.image_shape
    pixels = read_picture(path, (height, width), grey=grey or channels == 1)
    return pixels.float().expand(1 if grey else channels, -1, -1)[None] / 127.5 - 1


def _between(
    trained: TrainedModel, labels: Tensor | None, guidance: float | None, changes: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of ``fastdiff.interpolate``: the model's own, but for what that sets itself."""
    if labels is None and trained.classes and trained.unet.null_class is None:
        raise ValueError(f"--interpolate needs --class: one of {', '.join(trained.classes)}")
    if labels is None and guidance not in (None, 1.0):
        raise ValueError("--guidance needs --class where --interpolate is asked for")
    told = trained.arguments(labels, guidance, sampler="ddpm", **changes)
    return {
        name: value for name, value in told.items() if name not in ("sampler", "steps", "spacing", "sampler_options")
    }
