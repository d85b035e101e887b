"""Networks that predict the noise."""

from .unet import UNet

__all__ = ["UNet"]
