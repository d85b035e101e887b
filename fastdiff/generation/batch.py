"""One batch of a job's grid: its recipe, its images, and how large a batch is best."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec
import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastdiff.generation.formats import Entry, sha256, to_png
from fastdiff.generation.job import Job
from fastdiff.generation.labels import Labels
from fastdiff.generation.models import Model
from fastdiff.generation.prompts import Prompts
from fastdiff.pictures.embedded import Layout, packed, png_info_of, sha256_of
from fastdiff.pictures.grid import to_uint8
from fastdiff.pictures.network import environment
from fastdiff.pictures.recipe import Recipe, device_of

LARGEST = 256  # images of a batch that is looked for
GAIN = 1.05  # a larger batch is taken where it is faster by this factor
PATIENCE = 5.0  # seconds of a step


@dataclass
class Made:
    """A batch's images, float32 [B, C, H, W] on the CPU, its recipe, and into how many parts memory made it fall.

    given: of each image its label or its prompt. singles: of a batch-invariant job, each image's own recipe, which says
    nothing of the batch.
    """

    numbers: range
    given: Sequence[Any] | None
    recipe: Recipe
    images: Tensor
    parts: int
    singles: list[Recipe] = field(default_factory=list)


def recipe_of(job: Job, model: Model, numbers: range, given: Any) -> Recipe:
    """The recipe of some of a job's images, with the network's own environment of now."""
    recipe = model.told(job.images, given)
    arguments = dict(recipe.arguments)
    if numbers.start:
        arguments["sample_offset"] = numbers.start
    return msgspec.structs.replace(
        recipe, shape=[len(numbers), *recipe.shape[1:]], batch_size=len(numbers), arguments=arguments,
        made_with=environment(device_of(model.network)),
    )  # fmt: skip


def make(job: Job, model: Model, numbers: range, given: Any) -> Made:
    """Some images. What does not fit in the memory is made in halves; they may round differently, and are marked."""
    recipe = recipe_of(job, model, numbers, given)
    try:
        images = recipe.sample(model.network).cpu()
        if not bool(images.isfinite().all()):
            raise FloatingPointError("the images hold NaN or infinity")
        return Made(numbers, given, recipe, images, 1, _singles(job, model, numbers, given))
    except torch.OutOfMemoryError:
        if len(numbers) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(numbers) // 2
    a, b = (
        make(job, model, numbers[part], None if given is None else given[part])
        for part in (slice(half), slice(half, None))
    )
    return Made(numbers, given, recipe, torch.cat((a.images, b.images)), a.parts + b.parts, a.singles + b.singles)


def _singles(job: Job, model: Model, numbers: range, given: Any) -> list[Recipe]:
    if not (job.batch_invariant and job.recipes):
        return []
    parts = range(len(numbers))
    return [recipe_of(job, model, numbers[i : i + 1], None if given is None else given[i : i + 1]) for i in parts]


def entries(job: Job, model: Model, made: Made) -> list[Entry]:
    """A batch's images as they stand in a shard."""
    pixels = to_uint8(made.images).permute(0, 2, 3, 1).contiguous().numpy()
    embeds = job.recipes and job.format != "npz"
    shared = packed(made.recipe) if embeds and not made.singles else None
    common: dict[str, Any] = {
        "seed": made.recipe.arguments["seed"], "plan": job.plan_sha256, "network": made.recipe.network.sha256,
        "made_with": made.recipe.made_with,
    }  # fmt: skip
    if not job.batch_invariant:  # else nothing that is kept tells of the batch
        common["batch"] = [made.numbers.start, len(made.numbers)]
        if made.parts > 1:
            common["parts"] = made.parts
    found = []
    for i, number in enumerate(made.numbers):
        record: dict[str, Any] = {"number": number}
        if made.given is not None:
            record |= model.record(made.given[i])
        info = None
        if embeds:
            digest = hashlib.sha256()
            sha256_of(made.images[i : i + 1], digest)
            index, told = (None, packed(made.singles[i])) if shared is None else (i, shared)
            info = png_info_of(Layout(columns=1, scale=1, gap=0, sha256=digest.hexdigest(), index=index), told)
        if "prompt" in record:
            info = info or PngInfo()
            info.add_text("prompt", record["prompt"])
        png = to_png(pixels[i], info)
        hashes = {"sha256": sha256(pixels[i]), "png_sha256": hashlib.sha256(png).hexdigest()}
        found.append(Entry(job.image_name(number), {**record, **common, **hashes}, png))
    return found


def best_batch_size(job: Job, model: Model, given: Labels | Prompts) -> int:
    """The smallest batch that no larger one beats clearly in images a second, of the sizes that divide a shard."""
    most = min(LARGEST, job.shard_size, job.num)
    best, rate = 1, 0.0
    for size in (n for n in range(1, most + 1) if job.shard_size % n == 0 and n & (n - 1) in (0, n)):
        numbers = range(size)
        try:
            seconds = _seconds_of_a_step(recipe_of(job, model, numbers, given.of(numbers)), model)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if size / seconds < GAIN * rate:
            break
        best, rate = size, size / seconds
        if seconds > PATIENCE:
            break
    return best


def _seconds_of_a_step(recipe: Recipe, model: Model) -> float:
    """Of the second row, since what a layer keeps of its shapes is made in the first; of a plan of one row, all."""
    times = [time.perf_counter()]
    for state in islice(recipe.states(model.network), 3):  # the first is from before any row
        float(state.x.flatten()[0])  # waits for the device
        times.append(time.perf_counter())
    return times[-1] - (times[-2] if len(times) > 3 else times[0])
