"""fastdiff: fused, exactly reproducible diffusion sampling for PyTorch models.

images = fastdiff.sample(model, (64, 3, 32, 32), sampler="ddim", steps=50, seed=42)
"""

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

__version__ = "0.1.0"

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
]
