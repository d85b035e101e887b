"""``fastdiff train``: a UNet built for the data, trained by `Run`."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.checks import named_device
from fastdiff.models import UNet
from fastdiff.models.config import UNetConfig
from fastdiff.models.trained import load
from fastdiff.training import data as image_data
from fastdiff.training.folder import CHECKPOINT, check_folder
from fastdiff.training.loop import own_defaults
from fastdiff.training.run import Run
from fastdiff.training.settings import Settings, unet_config


def train_unet(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Train a class-conditional (or, for pictures without classes, unconditional) UNet; returns the folder `out`.

    out: a folder, made where it is missing, that diffusers and `UNet.from_pretrained` load: config.json,
        diffusion_pytorch_model.safetensors (the averaged weights) and scheduler_config.json; beside them
        training.json (settings, versions, classes, loss curve), loss.png, samples/step-N.png, and checkpoint.pt,
        which is needed only to resume. Each file appears whole or not at all, the checkpoint first, so a run may be
        killed at any time. Ctrl-C and SIGTERM end the step that is being done, keep it, and raise Interrupted.
    resume: as for `fastdiff.train`; what concerns sampling may be another, too. overwrite, progress: likewise.
    **settings: the other fields of `Settings`.

    Raises before any work TypeError or ValueError for a bad setting, FileExistsError where `out` holds a checkpoint or
    a model's weights and neither resume nor overwrite is set, FileNotFoundError for missing data or nothing to resume,
    ImportError with the command that helps where scikit-learn is missing; later FloatingPointError where the loss is
    no longer finite, and OSError where the disk is full, the file named.
    """
    if not isinstance(data, (str, os.PathLike)):
        raise TypeError(f'data must be "digits" or a folder; got {type(data).__name__}')
    with own_defaults():
        run = _run(Settings(data=os.fspath(data), **settings), Path(out), resume, overwrite, progress)
        run.loop(progress=progress)
    return Path(out)


def _run(settings: Settings, out: Path, resume: bool = False, overwrite: bool = False, progress: bool = False) -> Run:
    """The run that the settings ask for, at its first step or where its checkpoint is."""
    device = named_device(settings.device)
    check_folder(out, resume=resume, overwrite=overwrite)
    again = resume and not (out / CHECKPOINT).exists()
    if again:
        warnings.warn(f"{out} holds no {CHECKPOINT}: starting again at step 0, from its weights", stacklevel=4)
    initial = None
    if settings.init is not None:
        initial, settings = _initial(settings.init, settings)
    data = image_data.load(settings.data, size=settings.image_size, skip_broken=settings.skip_broken, progress=progress)
    if initial is not None:
        _check_initial(initial, str(settings.init), data)
        model = initial
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = UNet(**unet_config(settings, data))
    if again:
        kept = UNet.from_pretrained(out)
        if UNetConfig.from_dict(kept.config.to_dict()) != UNetConfig.from_dict(model.config.to_dict()):
            raise ValueError(
                f"the model in {out} is another one than size, channels, layers and the data ask for; overwrite it, "
                "or choose another folder"
            )
        model = kept
    classes = data.classes if model.config.num_class_embeds else ()
    return Run(
        model.float().train(), data, settings.noise_schedule(), settings, out, sampling=settings.sampling(),
        label_name="class_labels" if classes else None, null_class=model.null_class, device=device,
        resume=resume and not again, overwrite=overwrite,
    )  # fmt: skip


def _initial(folder: str, settings: Settings) -> tuple[UNet, Settings]:
    """The network of another folder, and the settings with its size where none was asked for."""
    trained = load(folder)
    here = settings.noise_schedule(), settings.prediction
    if (trained.sampling["schedule"], trained.sampling.get("prediction", "epsilon")) != here:
        warnings.warn(
            f"the network of {folder} was trained with another schedule or prediction than "
            f"schedule={settings.schedule!r}, timesteps={settings.timesteps}, prediction={settings.prediction!r}: it "
            "has to learn these anew",
            stacklevel=5,
        )
    if settings.size is None and settings.data != "digits" and trained.unet.config.sample_size is not None:
        settings = replace(settings, size=trained.image_shape[-1])
    return trained.unet, settings


def _check_initial(unet: UNet, folder: str, data: image_data.ImageData) -> None:
    """That a network can be trained further with these data; ValueError says why not."""
    config, channels = unet.config, data.shape[0]
    if (config.in_channels, config.out_channels) != (channels, channels):
        raise ValueError(
            f"init: the network of {folder} has {config.in_channels} channels in and {config.out_channels} out; the "
            f"data have {channels}"
        )
    if data.shape[-1] % config.downsampling:
        raise ValueError(
            f"init: the network of {folder} takes sides that divide by {config.downsampling}; size is {data.shape[-1]}"
        )
    unet.config = replace(config, sample_size=data.shape[-1])
    if not config.num_class_embeds:
        if data.classes:
            warnings.warn(f"the network of {folder} has no classes: those of the data are not learnt", stacklevel=5)
        return
    count = config.num_class_embeds - (config.null_class is not None)
    names = load(folder).classes
    unnamed = names == [str(label) for label in range(count)]
    if count != len(data.classes) or not (unnamed or names == list(data.classes)):
        told = f"{count} without names" if unnamed else ", ".join(names)
        raise ValueError(
            f"init: the classes of {folder} are {told}; those of the data are {', '.join(data.classes) or 'none'}"
        )
