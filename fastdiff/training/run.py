"""A training run: Algorithm 1 of Ho, Jain & Abbeel (2020) on any network, with averaged weights and checkpoints."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from fastdiff.ops.add_noise import add_noise
from fastdiff.sampling.model import first_tensor
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.training.data import Data, Draws
from fastdiff.training.folder import CHECKPOINT, prepare_folder, write_torch
from fastdiff.training.keep import load_into, state_of, write_curve, write_model, write_record, write_samples
from fastdiff.training.settings import RunSettings, resolve_dtype
from fastdiff.training.signals import Interrupted, Signals

_REPORT_EVERY = 50  # steps between looks at the loss, each of which waits for the device
_TIMED = 5  # the first steps of a process, which tell how long the run will take; the very first one is left out
_LONG = 3600.0  # seconds: a run that will take longer is warned of


@contextmanager
def own_defaults() -> Iterator[None]:
    """torch's usual default dtype and device, so that a run does not depend on what the process has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


class Run:
    """Everything that changes from step to step, and the folder that it is kept in.

    Args:
        model: the network, which is trained in place; model(x_t, t) predicts what ``settings.prediction`` says.
        data: batches of examples and labels.
        sampling: how the model is sampled unless asked otherwise, for training.json.
        out: the folder, or None where nothing is to be kept.
        label_name: the keyword that takes a batch's labels; None: there are none.
        null_class: the label that stands for none; None: labels are never dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        schedule: NoiseSchedule,
        settings: RunSettings,
        out: Path | None,
        *,
        sampling: dict[str, Any],
        label_name: str | None,
        null_class: int | None,
        device: torch.device,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.model, self.data, self.schedule, self.settings, self.out = model.to(device), data, schedule, settings, out
        self.sampling, self.label_name, self.null_class, self.device = sampling, label_name, null_class, device
        self.fingerprint = data.fingerprint()
        self.generator = torch.Generator().manual_seed(settings.seed)  # draws images, timesteps and dropped labels
        self.average = AveragedModel(self.model, multi_avg_fn=self._move_average)
        self.average.eval().requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=settings.lr, fused=True)
        self.dtype = resolve_dtype(settings.dtype, device)
        self.losses = torch.zeros(settings.steps, device=device)
        self.step = self.kept = 0  # steps done, and those of the last checkpoint
        self.seconds = 0.0
        self.random: list[Tensor] | None = None  # the state of torch's own generators, which dropout draws from
        if resume and out is not None:
            load_into(self, out / CHECKPOINT)
        self.average.n_averaged.fill_(self.step + 1)  # the first weights count; at 0 the next update would drop them
        for group in self.optimizer.param_groups:
            group["initial_lr"] = settings.lr
        warmup = settings.warmup
        self.warmup = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warmup), last_epoch=self.step - 1)
        draws = Draws(len(self.data), settings.batch_size, self.generator)
        # A generator of its own: an iterator of a DataLoader draws a seed for workers, by default from the global one.
        batches: Any = self.data  # it has a length and entries, which is all that a loader asks for
        loader: DataLoader[Any] = DataLoader(batches, batch_size=None, sampler=draws, generator=torch.Generator())
        self.batches = iter(loader)
        if out is not None:
            prepare_folder(out, overwrite=overwrite)

    # ---- the loop

    def loop(self, *, progress: bool = True) -> None:
        """Train up to the last step, keeping a checkpoint every `save_every` steps and at the end.

        Raises Interrupted (a KeyboardInterrupt) after Ctrl-C or SIGTERM, when the step that was being done is kept.
        """
        steps, self._started = self.settings.steps, time.perf_counter() - self.seconds
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        with (
            Signals() as signals,
            torch.enable_grad(),  # also where a process does without
            self._generators(),
            tqdm(total=steps, initial=self.step, disable=not progress, unit="step") as bar,
        ):
            try:
                self._steps(signals, bar)
                self.save(signals, last=True)  # also of a run that is resumed at its end: it may lack the pictures
            except Interrupted as interrupted:
                raise Interrupted(self._told(), interrupted.signal) from None
            finally:
                for module, training in modes:
                    module.training = training

    def _steps(self, signals: Signals, bar: Any) -> None:
        steps, first = self.settings.steps, self.step
        timed = 0.0
        while self.step < steps:
            self.losses[self.step] = self.train_step()
            self.step += 1
            bar.update()
            done = self.step - first
            if done in (1, _TIMED):  # the first one takes longer than the rest
                self.losses[self.step - 1].item()  # waits for the device
                timed, before = time.perf_counter(), timed
                if done == _TIMED:
                    self._estimate((timed - before) / (_TIMED - 1))
            if self.step % _REPORT_EVERY == 0 or self.step == steps:
                bar.set_postfix(loss=f"{self._recent_loss():.4f}")
            if signals.asked is not None:
                if self.step < steps or self.out is None:
                    self.save(signals, pictures=False)
                    raise Interrupted("", signals.asked)
            elif self.step % self.settings.save_every == 0 and self.step < steps:
                self.save(signals)

    def train_step(self) -> Tensor:
        """One step of Algorithm 1; the loss, a scalar on the device.

        The noise is keyed by (seed, place in the batch, step), so the generator's state is all there is to keep.
        """
        settings, batch, device = self.settings, self.settings.batch_size, self.device
        images, labels = next(self.batches)
        timesteps = torch.randint(len(self.schedule), (batch,), generator=self.generator).to(device)
        dropped = torch.rand(batch, generator=self.generator) < settings.label_dropout
        if settings.flip:
            mirrored = torch.rand(batch, generator=self.generator) < 0.5
            images = torch.where(mirrored.view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)
        given = {}
        if self.label_name is not None and labels is not None:
            if self.null_class is not None:
                rows = dropped.view(-1, *[1] * (labels.ndim - 1))
                labels = torch.where(rows, self.null_class, labels)
            given[self.label_name] = labels.to(device)
        images = images.to(device)
        x_t, noise = add_noise(images, timesteps, self.schedule, seed=settings.seed, draw=self.step)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out = self.model(x_t, timesteps, **given)
        predicted = out if isinstance(out, Tensor) else first_tensor(out)
        if predicted.shape != x_t.shape:
            raise ValueError(
                f"model must return {list(x_t.shape)}, the shape of its input; got {list(predicted.shape)}"
            )
        if not predicted.requires_grad:
            raise ValueError(
                "model's output has no gradient: it must be computed from the parameters, without detach() and outside "
                "of torch.inference_mode()"
            )
        loss = F.mse_loss(predicted.float(), self._target(images, noise, timesteps))

        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.warmup.step()
        self.average.update_parameters(self.model)
        return loss.detach()

    def _target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to predict."""
        if self.settings.prediction == "epsilon":
            return noise
        if self.settings.prediction == "sample":
            return images
        shape = (-1, *[1] * (images.ndim - 1))
        alpha = self.schedule.alphas.to(images)[timesteps].view(shape)
        sigma = self.schedule.sigmas.to(images)[timesteps].view(shape)
        return alpha * noise - sigma * images

    def _move_average(self, average: Any, current: Any, _: Any) -> None:
        """One step of the averaged weights: a short average at first, which forgets the untrained weights soon."""
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(average, current, self.step)

    @contextmanager
    def _generators(self) -> Iterator[None]:
        """torch's own generators, of which dropout draws, are the run's for a while, and the process's again after."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.settings.seed)
            if self.random is not None:
                torch.set_rng_state(self.random[0].cpu())
                if devices and len(self.random) > 1:
                    torch.cuda.set_rng_state(self.random[1].cpu(), self.device)
            yield

    def _recent_loss(self) -> float:
        """The mean loss since the last look; raises FloatingPointError once it is not finite."""
        loss = self.losses[max(0, self.step - _REPORT_EVERY) : self.step].mean().item()
        if not math.isfinite(loss):
            kept = f"; {self.out} holds step {self.kept}" if self.kept else ""
            raise FloatingPointError(f"the loss is {loss} by step {self.step}: a lower lr may help{kept}")
        return loss

    def _estimate(self, step: float) -> None:
        """Warn of a run that will take hours, at ``step`` seconds each."""
        left = step * (self.settings.steps - self.step)
        if left > _LONG:
            warnings.warn(
                f"{self.settings.steps - self.step} steps of {step:.2g} s will take about {left / 3600:.0f} hours on "
                f"this {self.device.type}: fewer steps, a smaller batch or network, or another device take less",
                stacklevel=2,
            )

    def _told(self) -> str:
        """What an interrupted run says."""
        told = f"interrupted at step {self.step} of {self.settings.steps}"
        if self.out is None:
            return told
        return f"{told}; {self.out} holds step {self.kept}" if self.kept else f"{told}, before anything was kept"

    # ---- what is kept

    def save(self, signals: Signals | None = None, *, pictures: bool = True, last: bool = False) -> None:
        """Write the checkpoint that resuming starts from, then the model and its records, and last the pictures.

        A run that is killed in between can be resumed: it writes the files anew at its next save. What else than the
        checkpoint cannot be written is a warning, but for the model's own files at the end, which are the result.
        """
        if self.out is None or self.step == 0:
            return
        signals = signals or Signals()
        self._recent_loss()
        self.seconds = time.perf_counter() - self._started
        write_torch(self.out / CHECKPOINT, state_of(self))
        self.kept = self.step
        for write in (write_model, write_record):
            self._attempt(write, needed=last)
        if not pictures:
            return
        signals.at_once = True
        try:
            if signals.asked is not None:
                raise Interrupted("", signals.asked)
            for write in (write_curve, write_samples):
                self._attempt(write)
        finally:
            signals.at_once = False

    def _attempt(self, write: Callable[[Run, Path], None], *, needed: bool = False) -> None:
        """Write something beside the checkpoint; what goes wrong is a warning, unless it is needed."""
        assert self.out is not None
        try:
            write(self, self.out)
        except Exception as error:
            if needed:
                raise
            warnings.warn(f"{error} (the training goes on)", stacklevel=2)
