"""Networks that predict the noise, and the folders that they live in."""

from .trained import TrainedModel, digits, load
from .unet import UNet

__all__ = ["TrainedModel", "UNet", "digits", "load"]
