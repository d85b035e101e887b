"""fastdiff: fused, exactly reproducible diffusion sampling for PyTorch models.

images = fastdiff.sample(model, (64, 3, 32, 32), sampler="ddim", steps=50, seed=42)
"""

from typing import TYPE_CHECKING, Any

from fastdiff import models, ops, samplers, textbook
from fastdiff.acceleration.accelerate import accelerate, refresh, restore
from fastdiff.info import info
from fastdiff.ops import add_noise, randn
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.sampling.interpolate import interpolate
from fastdiff.sampling.sample import sample, sample_iter
from fastdiff.sampling.state import State
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.spacing import Spacing
from fastdiff.version import __version__ as __version__

if TYPE_CHECKING:
    from fastdiff.training.train import train

__all__ = [
    "EDMSchedule",
    "FlowSchedule",
    "NoiseSchedule",
    "Plan",
    "Row",
    "Spacing",
    "State",
    "accelerate",
    "add_noise",
    "info",
    "interpolate",
    "models",
    "ops",
    "randn",
    "refresh",
    "restore",
    "sample",
    "sample_iter",
    "samplers",
    "textbook",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # with what only a training needs, such as Pillow
        from fastdiff.training.train import train

        return train
    raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
