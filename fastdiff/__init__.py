"""fastdiff: fused, exactly reproducible diffusion sampling for PyTorch models.

images = fastdiff.sample(model, (64, 3, 32, 32), sampler="ddim", steps=50, seed=42)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdiff import models, ops, samplers, schedules, textbook
from fastdiff.acceleration.accelerate import accelerate, refresh, restore
from fastdiff.info import info
from fastdiff.ops import add_noise, randn
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.sampling.interpolate import interpolate
from fastdiff.sampling.log_prob import log_prob
from fastdiff.sampling.sample import sample, sample_iter
from fastdiff.sampling.state import State
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.spacing import Spacing
from fastdiff.version import __version__ as __version__

if TYPE_CHECKING:
    from fastdiff import images, plots
    from fastdiff.generation.generate import generate
    from fastdiff.images import save_gif, save_grid, show
    from fastdiff.pictures.embedded import read_recipe
    from fastdiff.pictures.recipe import Recipe
    from fastdiff.pictures.reproduce import Reproduction, reproduce
    from fastdiff.text.load import load
    from fastdiff.text.pipeline import Pipeline
    from fastdiff.training.train import train
    from fastdiff.tuning.tune import tune

# What needs more than torch (Pillow, matplotlib) is loaded when it is asked for; None is the module itself.
_LAZY = {
    "Pipeline": "fastdiff.text.pipeline",
    "Recipe": "fastdiff.pictures.recipe",
    "Reproduction": "fastdiff.pictures.reproduce",
    "generate": "fastdiff.generation.generate",
    "images": None,
    "load": "fastdiff.text.load",
    "plots": None,
    "read_recipe": "fastdiff.pictures.embedded",
    "reproduce": "fastdiff.pictures.reproduce",
    "save_gif": "fastdiff.images",
    "save_grid": "fastdiff.images",
    "show": "fastdiff.images",
    "train": "fastdiff.training.train",
    "tune": "fastdiff.tuning.tune",
}

__all__ = [
    "EDMSchedule",
    "FlowSchedule",
    "NoiseSchedule",
    "Pipeline",
    "Plan",
    "Recipe",
    "Reproduction",
    "Row",
    "Spacing",
    "State",
    "accelerate",
    "add_noise",
    "generate",
    "images",
    "info",
    "interpolate",
    "load",
    "log_prob",
    "models",
    "ops",
    "plots",
    "randn",
    "read_recipe",
    "refresh",
    "reproduce",
    "restore",
    "sample",
    "sample_iter",
    "samplers",
    "save_gif",
    "save_grid",
    "schedules",
    "show",
    "textbook",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    module = import_module(_LAZY[name] or f"fastdiff.{name}")
    value = getattr(module, name) if _LAZY[name] else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
