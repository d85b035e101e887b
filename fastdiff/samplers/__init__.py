"""Samplers: functions of a noise schedule that return a ``Plan``. Adding one is adding numbers, a page each."""

from collections.abc import Callable

from fastdiff.plan import Plan
from fastdiff.samplers.ddim import ddim
from fastdiff.samplers.ddpm import ddpm

SAMPLERS: dict[str, Callable[..., Plan]] = {"ddpm": ddpm, "ddim": ddim}

__all__ = ["SAMPLERS", "ddim", "ddpm"]
