"""``fastdiff.train``: your own network, trained to predict noise."""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration.network import networks_in
from fastdiff.checks import named_device
from fastdiff.models import UNet
from fastdiff.models.checkpoint import read_weights
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.resolve import resolve_table
from fastdiff.training import data as training_data
from fastdiff.training.folder import CHECKPOINT, WEIGHTS, check_folder, read_torch, weights_in
from fastdiff.training.keep import GRID_STEPS
from fastdiff.training.loop import own_defaults
from fastdiff.training.run import Run
from fastdiff.training.settings import RunSettings


def train(
    model: nn.Module,
    data: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    schedule: NoiseSchedule | str = "linear",
    labels: str | None = "class_labels",
    null_class: int | None = None,
    size: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> nn.Module:
    """Train a network to predict the noise in noised data: Algorithm 1 of Ho, Jain & Abbeel (2020).

    ``model(x_t, t)``, or ``model(x_t, t, class_labels=y)`` where the data has labels, is called with x_t float32
    [B, …] and t int64 [B], and returns a tensor like x_t, a tuple that starts with one, or an object with ``.sample``.
    It is trained in place by AdamW; what is returned is a copy with the averaged weights, the one to draw from::

        network = fastdiff.train(MyUNet(), images, "my-model", steps=20_000)
        fastdiff.sample(network, (16, 3, 32, 32), sampler="ddim", steps=50)

    Args:
        model: a torch.nn.Module of float32 parameters, on any device.
        data: a tensor [N, …]: floating-point (images in [−1, 1]), or bytes 0 … 255; a pair of tensors (examples,
            labels); a torch Dataset with a length, whose items are an example or (example, label), read as they are
            drawn; a folder of pictures, whose subfolders are the classes, read into memory; or "digits".
        out: a folder for checkpoint.pt, training.json, loss.png, pictures of samples (of data [1 or 3, H, W]), and the
            averaged weights: weights.pt, for ``torch.load``, or for a ``fastdiff.models.UNet`` what ``fastdiff sample
            --model`` reads. Each file appears whole or not at all, the checkpoint first, so that a run may be killed
            at any time. None keeps nothing.
        schedule: a NoiseSchedule, or a name, as for ``fastdiff.sample``.
        labels: the keyword that takes a batch's labels; None leaves them out.
        null_class: the label that stands for none, which ``label_dropout`` of the labels are replaced by; by default
            the model's ``null_class``, if it has that attribute.
        size: pixels a side of pictures that are read from a folder, 32 by default.
        resume: go on from the checkpoint in ``out`` (with the same settings; ``steps``, ``lr`` and ``save_every`` may
            be others). On a CPU, with as many threads, the same versions and data that are tensors or pictures, the
            result has the bits of a run that was never interrupted. Without a checkpoint: from the weights there.
        overwrite: start anew in a folder that holds a run; what that wrote is removed.
        progress: a bar with the loss.
        settings: steps=6000, batch_size=64, lr=2e-4, warmup=200, seed=0, label_dropout=0.1, ema_decay=0.999,
            prediction="epsilon" ("v_prediction", "sample"), flip=False, dtype="auto" ("float32", "bfloat16"),
            device="auto" (where the model is), save_every=500: see ``fastdiff.training.settings.RunSettings``.

    Returns:
        The averaged network, a copy in eval mode.

    Raises:
        TypeError, ValueError, FileExistsError, FileNotFoundError: before any work, for what cannot be used as given.
        FloatingPointError: the loss is no longer finite.
        OSError: the checkpoint cannot be written; names the file.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; the step that was being done is kept, and the message says where.
    """
    if isinstance(model, type):
        raise TypeError(
            f"model must be a torch.nn.Module; got the class {model.__name__}: make one, {model.__name__}(…)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    table = resolve_table(schedule)
    chosen = RunSettings(**settings)
    parameters = list(model.parameters())
    if not any(p.requires_grad for p in parameters):
        raise ValueError("model has no parameter that requires a gradient: there is nothing to train")
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if dtypes != {torch.float32}:
        got = ", ".join(sorted(map(str, dtypes))) or "none of floating point"
        raise ValueError(f"model must have float32 parameters (dtype='bfloat16' is autocast); got {got}")
    if networks_in(model):
        raise ValueError("model is accelerated, which training does without; fastdiff.restore(model) first")
    device = parameters[0].device if chosen.device == "auto" else named_device(chosen.device)
    folder = None if out is None else Path(out)
    if folder is None and (resume or overwrite):
        raise ValueError("resume and overwrite are about a folder; give out")
    if folder is not None:
        check_folder(folder, resume=resume, overwrite=overwrite)
    with own_defaults():
        examples = training_data.of(data, size=size, progress=progress)
        first, given = examples[torch.arange(min(len(examples), 64))]
        clip = _check_range(first)
        if given is None or labels is None:
            labels = null_class = None
        else:
            _check_labels(model, labels)
            null_class = getattr(model, "null_class", None) if null_class is None else null_class
        again = resume and folder is not None and not (folder / CHECKPOINT).exists()
        if again and folder is not None:
            _load_weights(model, folder)
        sampling = {"sampler": "ddim", "steps": min(GRID_STEPS, len(table)), "clip": clip}
        run = Run(
            model, examples, table, chosen, folder, sampling=sampling, label_name=labels, null_class=null_class,
            device=device, resume=resume and not again, overwrite=overwrite,
        )  # fmt: skip
        run.loop(progress=progress)
    network: nn.Module = run.average.module
    for averaged, trained in zip(network.parameters(), model.parameters(), strict=True):
        averaged.requires_grad_(trained.requires_grad)
    return network


def _check_range(first: Tensor) -> float | None:
    """The bound of |x̂_0|, 1 for data in [−1, 1]; warns of data in [0, 1], which is seldom meant."""
    low, high = first.min().item(), first.max().item()
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError("data must be finite; it holds NaN or infinity")
    if low >= 0 and 0 < high <= 1:
        warnings.warn(
            "the first examples of data lie in [0, 1]: samples will, too; images are usually given as 2 * x - 1",
            stacklevel=3,
        )
    elif low >= 0 and 16 < high <= 255:
        warnings.warn(
            f"the first examples of data lie in [{low:g}, {high:g}], as bytes do: give images as bytes (uint8), or as "
            "floats in [-1, 1]",
            stacklevel=3,
        )
    return 1.0 if max(-low, high) <= 1 else None


def _check_labels(model: nn.Module, name: str) -> None:
    """That the network's forward takes labels under this name, where that can be seen."""
    if not isinstance(name, str):
        raise TypeError(f"labels must be the name of a keyword, or None; got {type(name).__name__}")
    try:
        takes = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return
    if all(p.name != name and p.kind is not p.VAR_KEYWORD for p in takes):
        raise ValueError(
            f"data has labels, which {type(model).__name__}.forward does not take as {name}=: say under which name it "
            "does (labels=…), or leave them out (labels=None)"
        )


def _load_weights(model: nn.Module, out: Path) -> None:
    """A folder's weights into the network; ValueError where they are another one's."""
    path = weights_in(out)
    assert path is not None
    warnings.warn(f"{out} holds no {CHECKPOINT}: starting again at step 0, from its weights", stacklevel=3)
    if path.name != WEIGHTS and not isinstance(model, UNet):
        raise ValueError(f"{path} is a fastdiff or diffusers UNet's, the model a {type(model).__name__}")
    state = read_torch(path, torch.device("cpu")) if path.name == WEIGHTS else read_weights(path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not fit this model: {error}") from error
