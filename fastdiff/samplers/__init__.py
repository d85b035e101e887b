"""Samplers: functions of a noise schedule that return a ``Plan``. Adding one is adding numbers, a page each."""

from collections.abc import Callable

from fastdiff.plan import Plan
from fastdiff.samplers.ddim import ddim
from fastdiff.samplers.ddpm import ddpm
from fastdiff.samplers.repaint import repaint

SAMPLERS: dict[str, Callable[..., Plan]] = {"ddpm": ddpm, "ddim": ddim, "repaint": repaint}

__all__ = ["SAMPLERS", "ddim", "ddpm", "repaint"]
