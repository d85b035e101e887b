"""fastdiff: fused, exactly reproducible diffusion sampling for PyTorch models.

images = fastdiff.sample(model, (64, 3, 32, 32), sampler="ddim", steps=50, seed=42)
"""

from fastdiff import models, ops, reference, samplers
from fastdiff.accelerate import accelerate, restore
from fastdiff.continuous import EDMSchedule, FlowSchedule
from fastdiff.info import info
from fastdiff.interpolate import interpolate
from fastdiff.ops import add_noise, randn
from fastdiff.plan import Plan, Row
from fastdiff.run import State
from fastdiff.sample import sample, sample_iter
from fastdiff.schedule import NoiseSchedule

__version__ = "0.1.0"

__all__ = [
    "EDMSchedule",
    "FlowSchedule",
    "NoiseSchedule",
    "Plan",
    "Row",
    "State",
    "accelerate",
    "add_noise",
    "info",
    "interpolate",
    "models",
    "ops",
    "randn",
    "reference",
    "restore",
    "sample",
    "sample_iter",
    "samplers",
]
