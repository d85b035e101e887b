"""One batch of a job's grid: its recipe, its images, and how large a batch is best."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import torch
from torch import Tensor

from fastdiff.generation.formats import Entry, sha256, to_png
from fastdiff.generation.job import Job
from fastdiff.generation.labels import keywords
from fastdiff.models.trained import TrainedModel
from fastdiff.pictures.embedded import Layout, packed, png_info_of, sha256_of
from fastdiff.pictures.grid import to_uint8
from fastdiff.pictures.network import environment
from fastdiff.pictures.recipe import Recipe, device_of

LARGEST = 256  # images of a batch that is looked for
GAIN = 1.05  # a larger batch is taken where it is faster by this factor
PATIENCE = 5.0  # seconds of a step


@dataclass
class Made:
    """A batch's images, float32 [B, C, H, W] on the CPU, its recipe, and into how many parts memory made it fall."""

    numbers: range
    labels: list[int] | None
    recipe: Recipe
    images: Tensor
    parts: int


def recipe_of(job: Job, trained: TrainedModel, numbers: range, labels: list[int] | None) -> Recipe:
    """The recipe of some of a job's images, with the network's own environment of now."""
    first = job.images
    of_batch = keywords(trained, labels, first.arguments.get("guidance_scale", 1.0))
    arguments = {**first.arguments, **of_batch}
    if numbers.start:
        arguments["sample_offset"] = numbers.start
    return msgspec.structs.replace(
        first, shape=[len(numbers), *first.shape[1:]], batch_size=len(numbers), arguments=arguments,
        made_with=environment(device_of(trained.unet)),
    )  # fmt: skip


def make(job: Job, trained: TrainedModel, numbers: range, labels: list[int] | None) -> Made:
    """Some images. What does not fit in the memory is made in halves, which may round differently, and is marked."""
    recipe = recipe_of(job, trained, numbers, labels)
    try:
        images = recipe.sample(trained.unet).cpu()
        if not bool(images.isfinite().all()):
            raise FloatingPointError("the images hold NaN or infinity")
        return Made(numbers, labels, recipe, images, 1)
    except torch.OutOfMemoryError:
        if len(numbers) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(numbers) // 2
    a, b = (
        make(job, trained, numbers[part], None if labels is None else labels[part])
        for part in (slice(half), slice(half, None))
    )
    return Made(numbers, labels, recipe, torch.cat((a.images, b.images)), a.parts + b.parts)


def entries(job: Job, classes: list[str], made: Made) -> list[Entry]:
    """A batch's images as they stand in a shard."""
    pixels = to_uint8(made.images).permute(0, 2, 3, 1).contiguous().numpy()
    shared = packed(made.recipe) if job.recipes and job.format != "npz" else None
    common: dict[str, Any] = {
        "seed": made.recipe.arguments["seed"], "plan": job.plan_sha256, "network": made.recipe.network.sha256,
        "batch": [made.numbers.start, len(made.numbers)], "made_with": made.recipe.made_with,
    }  # fmt: skip
    if made.parts > 1:
        common["parts"] = made.parts
    found = []
    for i, number in enumerate(made.numbers):
        info = None
        if shared is not None:
            digest = hashlib.sha256()
            sha256_of(made.images[i : i + 1], digest)
            info = png_info_of(Layout(columns=1, scale=1, gap=0, sha256=digest.hexdigest(), index=i), shared)
        png = to_png(pixels[i], info)
        record: dict[str, Any] = {"number": number}
        if made.labels is not None:
            record |= {"label": made.labels[i], "class": classes[made.labels[i]]}
        hashes = {"sha256": sha256(pixels[i]), "png_sha256": hashlib.sha256(png).hexdigest()}
        found.append(Entry(job.image_name(number), {**record, **common, **hashes}, png))
    return found


def best_batch_size(job: Job, trained: TrainedModel, labels: Any) -> int:
    """The smallest batch that no larger one beats clearly in images a second, of the sizes that divide a shard."""
    most = min(LARGEST, job.shard_size, job.num)
    best, rate = 1, 0.0
    for size in (n for n in range(1, most + 1) if job.shard_size % n == 0 and n & (n - 1) in (0, n)):
        numbers = range(size)
        try:
            seconds = _seconds_of_a_step(recipe_of(job, trained, numbers, labels.of(numbers)), trained)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if size / seconds < GAIN * rate:
            break
        best, rate = size, size / seconds
        if seconds > PATIENCE:
            break
    return best


def _seconds_of_a_step(recipe: Recipe, trained: TrainedModel) -> float:
    """Of the second row, since what a layer keeps of its shapes is made in the first; of a plan of one row, all."""
    times = [time.perf_counter()]
    for state in islice(recipe.states(trained.unet), 3):  # the first is from before any row
        float(state.x.flatten()[0])  # waits for the device
        times.append(time.perf_counter())
    return times[-1] - (times[-2] if len(times) > 3 else times[0])
