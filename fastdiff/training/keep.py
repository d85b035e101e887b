"""What a training run keeps in its folder: the state that it goes on from, the model, its record and its pictures."""

from __future__ import annotations

import warnings
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdiff.acceleration.worthwhile import accelerated
from fastdiff.models import UNet
from fastdiff.sampling.sample import sample
from fastdiff.training.folder import WEIGHTS, plot_loss, read_checkpoint, save_samples, write_json, write_torch
from fastdiff.version import __version__

if TYPE_CHECKING:
    from fastdiff.training.loop import Loop
    from fastdiff.training.run import Run

# A resumed run may change these; every other setting shapes the result. (The images themselves are compared.)
_FREE_TO_CHANGE = {
    "data", "size", "steps", "lr", "device", "save_every", "skip_broken", "sampler", "sampling_steps", "guidance",
}  # fmt: skip

GRID_STEPS = 50  # of DDIM, for the pictures of a training
_GRID_CLASSES, _GRID_EACH = 16, 6


def state_of(run: Loop) -> dict[str, Any]:
    """All that a run needs to go on to the same bits."""
    random = [torch.get_rng_state()]
    if run.device.type == "cuda":
        random.append(torch.cuda.get_rng_state(run.device))
    return {
        "settings": asdict(run.settings),
        "fingerprint": run.fingerprint,
        "environment": _environment(run.device),
        **run.identity(),
        "step": run.step,
        "seconds": run.seconds,
        "losses": run.losses[: run.step].cpu(),
        "generator": run.generator.get_state(),
        "random": random,
        "model": run.model.state_dict(),
        "ema": run.average.module.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }


def load_into(run: Loop, path: Path) -> None:
    """Put a run where a checkpoint left off; ValueError where that is another run's."""
    state = read_checkpoint(path, run.device)
    # What settings were that a checkpoint of an earlier version does not name.
    defaults = {field.name: field.default for field in fields(run.settings) if field.default is not MISSING}
    now, then = asdict(run.settings), defaults | state["settings"]
    changed = [name for name in now if name not in _FREE_TO_CHANGE and now[name] != then.get(name)]
    if changed:
        told = ", ".join(f"{name} {then.get(name)} (now {now[name]})" for name in changed)
        raise ValueError(f"{path} was made with other settings: {told}")
    if state["fingerprint"] != run.fingerprint:
        raise ValueError(f"{path} was made with other images than {now.get('data', 'data')} holds now")
    if state["step"] > run.settings.steps:
        raise ValueError(f"steps is {run.settings.steps}, but {path} has done {state['step']} already")
    environment = _environment(run.device)
    if state["environment"] != environment:
        warnings.warn(
            f"resuming with {environment} what ran with {state['environment']}: equal bits are not assured",
            stacklevel=4,
        )
    try:
        for name, own in run.identity().items():
            if name in state and not torch.equal(state[name].cpu(), own.cpu()):
                raise ValueError(f"its {name} are others")
        run.step = run.kept = state["step"]
        run.seconds = float(state["seconds"])
        run.losses[: run.step] = state["losses"]
        run.generator.set_state(state["generator"].cpu())
        run.random = state.get("random")
        run.model.load_state_dict(state["model"])
        run.average.module.load_state_dict(state["ema"])
        run.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} does not fit this model: {error}") from error


def _curve(run: Loop) -> tuple[list[int], list[float]]:
    """The loss as at most 200 means over equal stretches of steps, with the step that each one ends at."""
    width = -(-run.step // 200)
    parts = run.losses[: run.step].cpu().double().split(width)
    ends = [min((i + 1) * width, run.step) for i in range(len(parts))]
    return ends, [round(part.mean().item(), 6) for part in parts]


def write_network(network: Any, out: Path) -> None:
    """The averaged network: what diffusers and `fastdiff sample` load, or its state dict."""
    if isinstance(network, UNet):
        network.save_pretrained(out)
    else:
        write_torch(out / WEIGHTS, network.state_dict())


def write_record(run: Loop, out: Path) -> None:
    """How the model was made, and how it is sampled unless asked otherwise."""
    ends, losses = _curve(run)
    record = {
        "settings": asdict(run.settings),
        **run.record(),
        "images": len(run.data),
        "images_sha256": run.fingerprint,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "environment": _environment(run.device),
        "seconds": round(run.seconds, 1),
        "loss": {"step": ends, "mean": losses},
    }
    write_json(out / "training.json", record)


def write_curve(run: Loop, out: Path) -> None:
    """The loss by step as a picture."""
    plot_loss(out / "loss.png", *_curve(run))


def write_samples(run: Run, out: Path) -> None:
    """A grid of the averaged model's samples, the same noise each time: a row for each of the first 16 classes."""
    shape = run.data.shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        return  # no pictures
    names = list(run.data.classes[:_GRID_CLASSES]) if run.label_name is not None else []
    if run.label_name is not None and not names:
        return  # which labels there are is not known
    sampling, steps = dict(run.sampling), min(GRID_STEPS, len(run.schedule))
    guidance = sampling.pop("guidance_scale", 1.0)
    if sampling.get("steps", len(run.schedule)) > GRID_STEPS:
        sampling = {"sampler": "ddim", "steps": steps, "clip": sampling.get("clip")}
    batch = _GRID_EACH * (len(names) or 8)
    if names:
        labels = torch.arange(len(names), device=run.device).repeat_interleave(_GRID_EACH)
        sampling["model_kwargs"] = {run.label_name: labels}
        if guidance != 1 and run.null_class is not None:
            null = {run.label_name: torch.full_like(labels, run.null_class)}
            sampling |= {"guidance_scale": guidance, "uncond_kwargs": null}
    with accelerated(run.average.module):
        images = sample(
            run.average.module, (batch, *shape), schedule=run.schedule, prediction=run.settings.prediction,
            seed=run.settings.seed, **sampling,
        )  # fmt: skip
    path = out / "samples" / f"step-{run.step:06d}.png"
    save_samples(path, images, _GRID_EACH if names else 8, names)


def _environment(device: torch.device) -> dict[str, Any]:
    """What the bits of a run depend on besides its settings."""
    return {
        "fastdiff": __version__,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
