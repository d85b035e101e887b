"""Plans learned for a trained model, and kept in its folder: plans/5.json is its plan of five steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.models.trained import PLANS, TrainedModel
from fastdiff.plan.plan import Plan
from fastdiff.tuning.tune import tune

IMAGES = 256
FROM_THE_MODEL = ("schedule", "prediction", "variance", "clip", "thresholding", "model_kwargs", "uncond_kwargs",
                  "guidance_scale")  # fmt: skip


def tune_trained(
    trained: TrainedModel,
    *,
    steps: int,
    images: int = IMAGES,
    labels: Any = None,
    guidance_scale: float | None = None,
    start: str = "dpmpp_2m",
    **options: Any,
) -> Plan:
    """``fastdiff.tune`` with what belongs to a model: its schedule, prediction, clip, classes and guidance.

    labels: int64 [images]; None is all classes in turn. options: further arguments of ``tune``.
    """
    import torch

    if labels is None and trained.classes:
        labels = torch.arange(images, device="cpu") % len(trained.classes)
    parameter = next(trained.unet.parameters())
    labels = None if labels is None else labels.to(parameter.device)
    told = trained.arguments(labels, guidance_scale, sampler=start)
    kept = {name: told[name] for name in FROM_THE_MODEL if name in told}
    return tune(trained.unet, (images, *trained.image_shape), steps=steps, start=start, **{**kept, **options})


def tune_folder(folder: Path, counts: Sequence[int], **options: Any) -> list[Path]:
    """Learn a folder's plans of these numbers of steps, and keep each as plans/N.json. Returns the files."""
    from fastdiff.models.trained import load

    trained = load(folder)
    (folder / PLANS).mkdir(exist_ok=True)
    return [tune_trained(trained, steps=n, **options).save(folder / PLANS / f"{n}.json") for n in counts]
