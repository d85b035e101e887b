"""A trained model's folder: the network, and how it is to be sampled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdiff.files import read_json_object
from fastdiff.models.unet import UNet
from fastdiff.plan.plan import Plan
from fastdiff.samplers.names import understood
from fastdiff.schedules.convert import from_diffusers
from fastdiff.schedules.diffusers_config import class_of, kind, prediction_type
from fastdiff.schedules.discrete import NoiseSchedule

_DIGITS = Path(__file__).resolve().parents[1] / "assets" / "digits"
PLANS = "plans"  # in a model's folder: 5.json is its learned plan of five steps (``fastdiff.tune``)
TUNED = "tuned"  # the sampler's name that stands for them
_FIXED = ("steps", "schedule", "prediction", "variance", "spacing", "eta", "clip", "sampler_options")  # by a plan
PACKAGED = "package:digits"  # what ``digits`` calls its folder, which lies elsewhere on every machine


@dataclass
class TrainedModel:
    """A network and the arguments of ``fastdiff.sample`` that belong to it.

    Attributes:
        unet: the network, in eval mode.
        sampling: schedule, prediction, spacing, clip and, where the folder says, variance, sampler, steps and eta.
        guidance_scale: what the folder was tuned for; 1 where it does not say.
        classes: the names of the classes; empty for an unconditional model.
        plans: the files of its learned plans by their steps: sampler="tuned", steps=5 takes plans[5].
    """

    unet: UNet
    sampling: dict[str, Any]
    guidance_scale: float = 1.0
    classes: list[str] = field(default_factory=list)
    plans: dict[int, Path] = field(default_factory=dict)

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.unet.parameters())
        shape = "" if self.unet.config.sample_size is None else f", images {list(self.image_shape)}"
        classes = f", {len(self.classes)} classes" if self.classes else ""
        guidance = f", guidance_scale={self.guidance_scale:g}" if self.guidance_scale != 1 else ""
        told = "".join(f", {name}={value!r}" for name, value in self.sampling.items())
        plans = f", tuned for {', '.join(map(str, self.plans))} steps" if self.plans else ""
        kind = type(self.unet).__name__
        return f"TrainedModel({kind} of {parameters:,} parameters{shape}{classes}{guidance}{told}{plans})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of its images: C is what the network takes, since one of learned variance returns 2C channels."""
        config = self.unet.config
        size = config.sample_size
        if size is None:
            raise ValueError("the model's config has no sample_size: the images' size is not known")
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def arguments(
        self, labels: torch.Tensor | None = None, guidance_scale: float | None = None, **changes: Any
    ) -> dict[str, Any]:
        """The arguments of ``fastdiff.sample`` beside the model and the shape.

        labels: int64 [B], the class of each image, for a class-conditional model.
        guidance_scale: in place of the folder's; 1 is none.
        changes: further arguments in place of the folder's, such as sampler and steps; sampler="tuned" takes the
            folder's learned plan of so many steps.
        """
        arguments = dict(self.sampling)
        sampler = changes.get("sampler", arguments.get("sampler", "ddpm"))
        if sampler == TUNED:
            sampler = changes["sampler"] = self.tuned(changes.pop("steps", arguments.get("steps")))
            arguments = {name: value for name, value in arguments.items() if name not in _FIXED}
        if isinstance(sampler, str):
            sampler, said = understood(sampler)
            if said is not None:
                arguments.pop("spacing", None)  # the folder's; "DPM++ 2M Karras" says its own
        if sampler != "ddpm" and not str(arguments.get("variance")).startswith("learned"):
            arguments.pop("variance", None)  # the folder's; one that was asked for goes to `sample`, which refuses it
        if sampler != "ddim":
            arguments.pop("eta", None)
        if sampler in ("lcm", "tcd"):
            arguments.pop("spacing", None)  # they walk the timesteps that networks were distilled on
        walk, spacing = dict(arguments.pop("sampler_options", {})), changes.get("spacing", arguments.get("spacing"))
        if spacing != "leading":
            walk.pop("steps_offset", None)  # it belongs to the folder's spacing
        if spacing not in ("leading", "trailing"):
            walk.pop("final", None)  # others end at index 0, from where no step leads to σ_min, or are no index's
        if walk:
            arguments["sampler_options"] = walk
        arguments |= changes
        if labels is None:
            return arguments
        if isinstance(sampler, Plan) and sampler.provenance is not None and guidance_scale is None:
            guidance_scale = sampler.provenance.guidance_scale  # what the plan was learned under
        arguments["model_kwargs"] = {"class_labels": labels}
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        null = self.unet.null_class
        if scale != 1:
            if null is None:
                raise ValueError(f"guidance_scale={scale} needs a model with a null class; this one has none")
            arguments |= {"guidance_scale": scale, "uncond_kwargs": {"class_labels": torch.full_like(labels, null)}}
        return arguments

    def tuned(self, steps: int | None = None) -> Plan:
        """The folder's learned plan of so many steps; None is the only one. ValueError says which there are."""
        if steps is None and len(self.plans) == 1:
            steps = next(iter(self.plans))
        if steps not in self.plans:
            there = f"it has {', '.join(map(str, self.plans))}" if self.plans else "it has none"
            raise ValueError(
                f"the model has no tuned plan of {steps} steps; {there}: fastdiff tune --model FOLDER --steps N makes "
                f"one, FOLDER/{PLANS}/N.json"
            )
        return Plan.load(self.plans[steps])


def load(folder: str | os.PathLike[str]) -> TrainedModel:
    """A folder that ``fastdiff train`` or diffusers wrote: a model's, or a DDPM pipeline's.

    Its schedule is what scheduler_config.json describes (``schedules.from_diffusers``): a table of betas, a flow or
    EDM's. What the file does not say is not invented: no clip where its class has none. A network that returns twice
    its channels has a learned variance, unless the scheduler is a DDPMScheduler, which says which.

    Raises FileNotFoundError or ValueError, naming the path and what is wrong.
    """
    root = Path(folder)
    unet = UNet.from_pretrained(root).eval()
    sampling: dict[str, Any] = {"schedule": NoiseSchedule.linear()}
    for place in (root / "scheduler_config.json", root / "scheduler" / "scheduler_config.json"):
        if place.exists():
            sampling = _scheduler(place)
            break
    if unet.config.out_channels == 2 * unet.config.in_channels:
        sampling.setdefault("variance", "learned_range")  # whatever the scheduler's class; PixArt's has no word for it
    trained = TrainedModel(unet, sampling, plans=_plans(root / PLANS))
    record = root / "training.json"
    if record.exists():
        told = read_json_object(record)
        more, classes = told.get("sampling", {}), told.get("classes", [])
        if not isinstance(more, dict) or not isinstance(classes, list):
            raise ValueError(f"{record}: sampling must be an object and classes a list; got {more!r} and {classes!r}")
        trained.sampling |= {name: value for name, value in more.items() if name != "guidance_scale"}
        trained.classes = [str(name) for name in classes]
        try:
            trained.guidance_scale = float(more.get("guidance_scale", 1.0))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{record}: guidance_scale: {error}") from error
    elif unet.config.num_class_embeds:
        count = unet.config.num_class_embeds - (unet.null_class is not None)
        trained.classes = [str(i) for i in range(count)]
    return trained


def _plans(folder: Path) -> dict[int, Path]:
    """The files of a folder's learned plans, by their numbers of steps."""
    found = {int(path.stem): path for path in folder.glob("*.json") if path.stem.isdecimal()}
    return dict(sorted(found.items()))


def digits() -> TrainedModel:
    """The model in the package: 8 × 8 handwritten digits, class-conditional, trained by ``fastdiff train``."""
    trained = load(_DIGITS)
    trained.unet.name_or_path = PACKAGED
    return trained


_WALKED = {
    "EDMEuler": "euler",
    "FlowMatchEulerDiscrete": "euler",
    "FlowMatchHeunDiscrete": "heun",
    "FlowMatchLCM": "lcm",
}
_VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large",
              "learned_range": "learned_range"}  # fmt: skip
_REFUSED = {
    "fixed_large_log": "diffusers takes the square root of a logarithm there, which is NaN: take fixed_large",
    "learned": "diffusers takes the square root of what the network says, which may be negative: take learned_range",
}


def _scheduler(path: Path) -> dict[str, Any]:
    config = read_json_object(path)
    try:
        return sampling_of(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def sampling_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``fastdiff.sample`` that a diffusers scheduler's config stands for."""
    sampling: dict[str, Any] = {"schedule": from_diffusers(config), "prediction": prediction_type(config)}
    name, table = class_of(config), sampling["schedule"].table_length is not None
    variance = config.get("variance_type")
    if table and variance is not None and name in ("", "DDPM", "DDPMParallel", "UnCLIP"):
        if variance not in _VARIANCES:
            why = _REFUSED.get(variance, "it must be fixed_small, fixed_large or learned_range")
            raise ValueError(f"variance_type is {variance!r}; {why}")
        sampling["variance"] = _VARIANCES[variance]
    if name in _WALKED:
        sampling["sampler"] = _WALKED[name]
    if (spacing := _spacing(config, name)) is not None:
        sampling["spacing"] = spacing
    walk: dict[str, Any] = {}
    if config.get("steps_offset") and spacing == "leading":
        walk["steps_offset"] = config["steps_offset"]
    if config.get("set_alpha_to_one", name != "PNDM") is False and name in _ENDING:
        walk["final"] = "sigma_min"
    if config.get("thresholding"):
        ratio, most = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        sampling["thresholding"] = (float(ratio), float(most))
    else:
        clips = name in _CLIPPING and config.get("clip_sample", _CLIPPING[name])
        sampling["clip"] = float(config.get("clip_sample_range", 1.0)) if clips else None
    return sampling | ({"sampler_options": walk} if walk else {})


# Classes that clip x̂_0, and whether they do where the config is silent; others ignore the key, whatever it says.
_CLIPPING = {"": False, "DDPM": True, "DDPMParallel": True, "DDIM": True, "DDIMParallel": True, "DDIMInverse": True,
             "CogVideoXDDIM": True, "CogVideoXDPM": True, "RePaint": True, "UnCLIP": True, "HeunDiscrete": False,
             "LCM": False, "TCD": False}  # fmt: skip
# Classes that read set_alpha_to_one.
_ENDING = ("", "DDIM", "DDIMParallel", "DDIMInverse", "CogVideoXDDIM", "CogVideoXDPM", "PNDM", "LCM", "TCD")
_LEADING = ("", "DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "CogVideoXDDIM", "CogVideoXDPM", "PNDM",
            "LCM", "TCD")  # fmt: skip
_SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}


def _spacing(config: Mapping[str, Any], name: str) -> str | None:
    """The spacing that a config's class makes its list by; None is the schedule's own."""
    for key, spacing in _SIGMAS.items():
        if config.get(key):
            return spacing
    found = kind(config)
    if found == "edm":
        return "exponential" if config.get("sigma_schedule") == "exponential" else "karras"
    if found == "flow":
        if name not in ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"):
            return None
        return "linspace" if config.get("use_dynamic_shifting") else "sd3"
    if name in ("RePaint", "UnCLIP"):
        return "leading" if name == "RePaint" else "linspace"
    return str(config.get("timestep_spacing", "leading" if name in _LEADING else "linspace"))
