"""Samplers: functions of a noise schedule that return a ``Plan``. Adding one is adding numbers, on a page of its own."""

from fastdiff.samplers.ddim import ddim
from fastdiff.samplers.ddpm import ddpm

SAMPLERS = {"ddpm": ddpm, "ddim": ddim}

__all__ = ["SAMPLERS", "ddim", "ddpm"]
