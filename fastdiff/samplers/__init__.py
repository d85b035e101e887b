"""Samplers: functions of a noise schedule that return a ``Plan``. Adding one is adding numbers, a page each."""

from collections.abc import Callable

from fastdiff.plan import Plan
from fastdiff.samplers.ddim import ddim
from fastdiff.samplers.ddim_inverse import ddim_inverse
from fastdiff.samplers.ddpm import ddpm
from fastdiff.samplers.dpm2 import dpm2, dpm2_ancestral
from fastdiff.samplers.euler import euler
from fastdiff.samplers.euler_ancestral import euler_ancestral
from fastdiff.samplers.heun import heun
from fastdiff.samplers.lcm import lcm
from fastdiff.samplers.tcd import tcd

SAMPLERS: dict[str, Callable[..., Plan]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "ddim_inverse": ddim_inverse,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2_ancestral,
    "lcm": lcm,
    "tcd": tcd,
}

__all__ = [
    "SAMPLERS", "ddim", "ddim_inverse", "ddpm", "dpm2", "dpm2_ancestral", "euler", "euler_ancestral", "heun", "lcm",
    "tcd",
]  # fmt: skip
