"""Training a UNet to predict noise: Algorithm 1 of Ho, Jain & Abbeel (2020), with classes and averaged weights."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import fastdiff
from fastdiff.files import atomic_write, check_writable, remove_leftovers
from fastdiff.images import save_grid
from fastdiff.models import UNet
from fastdiff.models.checkpoint import PICKLE, SAFETENSORS
from fastdiff.training import data as image_data
from fastdiff.training.settings import (
    SAMPLING,
    SCHEDULES,
    Settings,
    resolve_device,
    resolve_dtype,
    scheduler_config,
    unet_config,
)

# A resumed run may change these; every other setting shapes the result. (The images themselves are compared.)
_FREE_TO_CHANGE = {"data", "size", "steps", "device", "save_every"}

_REPORT_EVERY = 50  # steps between looks at the loss, each of which waits for the device

# What a run writes, as regular expressions: what a killed run left half written of these is cleared away.
_FILES = r"checkpoint\.pt|(?:config|scheduler_config|training)\.json|diffusion_pytorch_model\.safetensors|loss\.png"
_SAMPLES = r"step-\d{6,}\.png"


def train(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Train a class-conditional (or, for pictures without classes, unconditional) UNet; returns the folder `out`.

    out: a folder, made where it is missing, that diffusers and `UNet.from_pretrained` load: config.json,
        diffusion_pytorch_model.safetensors (the averaged weights) and scheduler_config.json; beside them
        training.json (settings, versions, classes, loss curve), loss.png, samples/step-N.png, and checkpoint.pt,
        which is needed only to resume. Each file appears whole or not at all, so a run may be killed at any time.
    resume: go on from the checkpoint in `out`, with the same settings and data; `steps` may be larger. On a CPU, with
        as many threads and the same versions, the result has the bits of a run that was never interrupted.
    progress: a bar with the loss. **settings: the other fields of `Settings`.

    Raises before any work TypeError or ValueError for a bad setting, FileExistsError where `out` holds a checkpoint or
    a model's weights and resume is not set, FileNotFoundError for missing data or nothing to resume, ImportError with
    the command that helps where matplotlib or scikit-learn is missing; later FloatingPointError where the loss is no
    longer finite.
    """
    with _own_defaults():
        run = Run(Settings(data=_check_data_name(data), **settings), Path(out), resume=resume)
        run.loop(progress=progress)
    return run.out


@contextmanager
def _own_defaults() -> Iterator[None]:
    """torch's usual default dtype and device, so that a run does not depend on what the process has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


class Run:
    """A training run: everything that changes from step to step, and the folder that it is kept in."""

    def __init__(self, settings: Settings, out: Path, *, resume: bool) -> None:
        self.settings, self.out = settings, out
        self.device = resolve_device(settings.device)
        _check_folder(out, resume)
        _check_matplotlib()

        self.data = image_data.load(settings.data, size=settings.image_size)
        self.fingerprint = _fingerprint(self.data)
        self.schedule = SCHEDULES[settings.schedule]()
        self.generator = torch.Generator().manual_seed(settings.seed)  # draws images, timesteps and dropped labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = UNet(**unet_config(settings, self.data)).to(self.device)
        self.average = AveragedModel(self.model, multi_avg_fn=self._move_average)
        self.average.eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr, fused=True)
        self.dtype = resolve_dtype(settings.dtype, self.device)
        self.losses = torch.zeros(settings.steps, device=self.device)
        self.step = 0
        self.seconds = 0.0
        if resume:
            self._load()
        self.average.n_averaged.fill_(self.step + 1)  # the first weights count; at 0 the next update would drop them
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", settings.lr)
        warmup = settings.warmup
        self.warmup = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warmup), last_epoch=self.step - 1)
        draws = image_data.Draws(len(self.data), settings.batch_size, self.generator)
        # A generator of its own: an iterator of a DataLoader draws a seed for workers, by default from the global one.
        data: Any = self.data  # it has a length and entries, which is all that a loader asks for
        loader: DataLoader[Any] = DataLoader(data, batch_size=None, sampler=draws, generator=torch.Generator())
        self.batches = iter(loader)
        _make_folder(out)

    def loop(self, *, progress: bool = True) -> None:
        """Train up to the last step, keeping a checkpoint every `save_every` steps and at the end."""
        steps, started = self.settings.steps, time.perf_counter() - self.seconds
        with tqdm(total=steps, initial=self.step, disable=not progress, unit="step") as bar:
            while self.step < steps:
                self.losses[self.step] = self.train_step()
                self.step += 1
                bar.update()
                if self.step % _REPORT_EVERY == 0 or self.step == steps:
                    bar.set_postfix(loss=f"{self._recent_loss():.4f}")
                if self.step % self.settings.save_every == 0 and self.step < steps:
                    self.seconds = time.perf_counter() - started
                    self.save()
        self.seconds = time.perf_counter() - started
        self.save()  # also of a run that is resumed at its last step, since it may have been killed in its last save

    def train_step(self) -> torch.Tensor:
        """One step of Algorithm 1; the loss, a scalar on the device.

        The noise is keyed by (seed, place in the batch, step), so the generator's state is all there is to keep.
        """
        settings, batch, device = self.settings, self.settings.batch_size, self.device
        images, labels = next(self.batches)
        timesteps = torch.randint(len(self.schedule), (batch,), generator=self.generator).to(device)
        dropped = torch.rand(batch, generator=self.generator) < settings.label_dropout
        if labels is not None:
            labels = torch.where(dropped, len(self.data.classes), labels).to(device)
        x_t, noise = fastdiff.add_noise(images.to(device), timesteps, self.schedule, seed=settings.seed, draw=self.step)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            prediction = self.model(x_t, timesteps, class_labels=labels)
        loss = F.mse_loss(prediction.float(), noise)

        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.warmup.step()
        self.average.update_parameters(self.model)
        return loss.detach()

    def _move_average(self, average: Any, current: Any, _: Any) -> None:
        """One step of the averaged weights: a short average at first, which forgets the untrained weights soon."""
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(average, current, self.step)

    def save(self) -> None:
        """Write the checkpoint that resuming starts from, then the model and its records, and last the pictures.

        A run that is killed in between can be resumed: it writes the files anew at its next save.
        """
        checkpoint = io.BytesIO()  # written by torch itself, a full disk would be told as a RuntimeError of its own
        torch.save(self._state(), checkpoint)
        with atomic_write(self.out / "checkpoint.pt") as file:
            file.write(checkpoint.getbuffer())
        network: Any = self.average.module
        network.save_pretrained(self.out)
        _write_json(self.out / "scheduler_config.json", scheduler_config(self.settings.schedule))
        _write_json(self.out / "training.json", self._record())
        _plot(self.out / "loss.png", *self._curve())
        self._save_samples()

    def _state(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "fingerprint": self.fingerprint,
            "environment": _environment(self.device),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses[: self.step].cpu(),
            "generator": self.generator.get_state(),
            "model": self.model.state_dict(),
            "ema": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _load(self) -> None:
        path = self.out / "checkpoint.pt"
        state = _read_checkpoint(path, self.device)
        now, then = asdict(self.settings), state["settings"]
        changed = [name for name in now if name not in _FREE_TO_CHANGE and now[name] != then.get(name)]
        if changed:
            told = ", ".join(f"{name} {then.get(name)} (now {now[name]})" for name in changed)
            raise ValueError(f"{path} was made with other settings: {told}")
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(f"{path} was made with other images than {self.settings.data} holds now")
        if state["step"] > self.settings.steps:
            raise ValueError(f"steps is {self.settings.steps}, but {path} has done {state['step']} already")
        environment = _environment(self.device)
        if state["environment"] != environment:
            warnings.warn(
                f"resuming with {environment} what ran with {state['environment']}: equal bits are not assured",
                stacklevel=4,
            )
        try:
            self.step, self.seconds = state["step"], state["seconds"]
            self.losses[: self.step] = state["losses"]
            self.generator.set_state(state["generator"].cpu())
            self.model.load_state_dict(state["model"])
            self.average.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} does not fit this model: {error}") from error

    def _recent_loss(self) -> float:
        """The mean loss since the last look; raises FloatingPointError once it is not finite."""
        loss = self.losses[max(0, self.step - _REPORT_EVERY) : self.step].mean().item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} by step {self.step}: a lower lr may help")
        return loss

    def _curve(self) -> tuple[list[int], list[float]]:
        """The loss as at most 200 means over equal stretches of steps, with the step that each one ends at."""
        width = -(-self.step // 200)
        parts = self.losses[: self.step].cpu().double().split(width)
        ends = [min((i + 1) * width, self.step) for i in range(len(parts))]
        return ends, [round(part.mean().item(), 6) for part in parts]

    def _record(self) -> dict[str, Any]:
        ends, losses = self._curve()
        return {
            "settings": asdict(self.settings),
            "classes": self.data.classes,
            "sampling": SAMPLING,
            "images": len(self.data),
            "images_sha256": self.fingerprint,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "environment": _environment(self.device),
            "seconds": round(self.seconds, 1),
            "loss": {"step": ends, "mean": losses},
        }

    def _save_samples(self) -> None:
        """A grid of the averaged model's samples, the same noise each time: six a class for the first 16 classes."""
        classes, size = len(self.data.classes), self.settings.image_size
        columns = min(classes, 16) or 8
        sampling = dict(SAMPLING)
        guidance = sampling.pop("guidance_scale")
        if classes:
            labels = torch.arange(6 * columns, device=self.device) % columns
            sampling["model_kwargs"] = {"class_labels": labels}
            if guidance != 1:
                null = {"class_labels": torch.full_like(labels, classes)}
                sampling |= {"guidance_scale": guidance, "uncond_kwargs": null}
        shape = (6 * columns, self.data.pixels.shape[1], size, size)
        images = fastdiff.sample(
            self.average.module, shape, schedule=self.schedule, seed=self.settings.seed, **sampling
        )
        save_grid(self.out / "samples" / f"step-{self.step:06d}.png", images, columns=columns)


def _read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What `Run._state` wrote; ValueError for a file that is damaged or something else's."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a damaged pickle's seek
            raise
        reason = [type(error).__name__, *str(error).splitlines()[:1]]
        raise ValueError(f"{path} is unreadable ({': '.join(reason)})") from error
    needed = ("settings", "fingerprint", "environment", "step", "seconds", "losses", "generator", "model", "ema",
              "optimizer")  # fmt: skip
    missing = [name for name in needed if not isinstance(state, dict) or name not in state]
    if missing or not isinstance(state["settings"], dict) or type(state["step"]) is not int:
        raise ValueError(f"{path} is no checkpoint of fastdiff train" + (f": it lacks {missing[0]}" if missing else ""))
    return state


def _check_data_name(data: object) -> str:
    if not isinstance(data, (str, os.PathLike)):
        raise TypeError(f'data must be "digits" or a folder; got {type(data).__name__}')
    return os.fspath(data)


def _check_folder(out: Path, resume: bool) -> None:
    """Say why `out` cannot be used, if so."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out must be a folder; {out} is a file")
    if resume and not (out / "checkpoint.pt").exists():
        raise FileNotFoundError(f"nothing to resume: {out} holds no checkpoint.pt")
    if not resume:
        if (out / "checkpoint.pt").exists():
            raise FileExistsError(f"{out} holds a checkpoint.pt already: resume it, or choose another folder")
        weights = [name for name in (SAFETENSORS, PICKLE) if (out / name).exists()]
        if weights:
            raise FileExistsError(
                f"{out} holds a model's {weights[0]}, but no checkpoint.pt to resume from: "
                "move the model away, or choose another folder"
            )


def _make_folder(out: Path) -> None:
    """Make `out`, know that it can be written, and clear away what a killed run had half written."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    check_writable(out / "config.json")
    remove_leftovers(out, _FILES)
    remove_leftovers(out / "samples", _SAMPLES)


def _check_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('the loss curve is drawn by matplotlib: pip install "fastdiff-torch[train]"') from error


def _fingerprint(data: image_data.ImageData) -> str:
    digest = hashlib.sha256(f"{list(data.pixels.shape)}".encode())
    digest.update(data.pixels.numpy().tobytes())
    if data.labels is not None:
        digest.update(data.labels.numpy().tobytes())
    return digest.hexdigest()


def _environment(device: torch.device) -> dict[str, Any]:
    """What the bits of a run depend on besides its settings."""
    return {
        "fastdiff": fastdiff.__version__,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _plot(path: Path, steps: list[int], losses: list[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(steps, losses)
    axes.set(xlabel="step", ylabel="mean squared error of the noise")
    axes.grid(alpha=0.3, which="both")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
