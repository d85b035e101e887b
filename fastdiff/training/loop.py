"""The loop of every training: batches, AdamW, averaged weights, checkpoints, signals. Subclasses say what is learnt."""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from fastdiff.training.data import Data, Draws
from fastdiff.training.folder import CHECKPOINT, prepare_folder, write_torch
from fastdiff.training.keep import load_into, state_of, write_curve, write_network, write_record
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


class Loop(ABC):
    """Everything that changes from step to step, and the folder that it is kept in. A subclass says what is learnt.

    Args:
        model: the network, which is trained in place.
        data: batches of examples and labels.
        out: the folder, or None where nothing is to be kept.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: RunSettings,
        out: Path | None,
        *,
        device: torch.device,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.model, self.data, self.settings, self.out = model.to(device), data, settings, out
        self.device = device
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
        self.rate = LambdaLR(self.optimizer, settings.rate_at, last_epoch=self.step - 1)
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
        """One step; the loss, a scalar on the device."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.average.update_parameters(self.model)
        return loss.detach()

    # ---- what a subclass says

    @abstractmethod
    def loss(self) -> Tensor:
        """The loss of the next batch. Whatever it draws comes from `generator`, or is keyed by `step`."""

    def identity(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the settings, and another run's would have otherwise."""
        return {}

    def record(self) -> dict[str, Any]:
        """Entries of training.json of its own."""
        return {}

    def write_model(self, out: Path) -> None:
        """The averaged network: what diffusers and `fastdiff sample` load, or its state dict."""
        write_network(self.average.module, out)

    def write_samples(self, out: Path) -> None:
        """A picture of what the averaged network does, where a subclass draws one."""
        return

    # ---- the rest of the loop

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
        for write in (self.write_model, self._write_record):
            self._attempt(write, needed=last)
        if not pictures:
            return
        signals.at_once = True
        try:
            if signals.asked is not None:
                raise Interrupted("", signals.asked)
            for write in (self._write_curve, self.write_samples):
                self._attempt(write)
        finally:
            signals.at_once = False

    def _attempt(self, write: Callable[[Path], None], *, needed: bool = False) -> None:
        """Write something beside the checkpoint; what goes wrong is a warning, unless it is needed."""
        assert self.out is not None
        try:
            write(self.out)
        except Exception as error:
            if needed:
                raise
            warnings.warn(f"{error} (the training goes on)", stacklevel=2)

    def _write_record(self, out: Path) -> None:
        write_record(self, out)

    def _write_curve(self, out: Path) -> None:
        write_curve(self, out)
