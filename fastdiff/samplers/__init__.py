"""Samplers: functions of a noise schedule that return a ``Plan``. Adding one is adding numbers, a page each."""

from collections.abc import Callable

from fastdiff.plan import Plan
from fastdiff.samplers.ddim import ddim
from fastdiff.samplers.ddpm import ddpm
from fastdiff.samplers.deis import deis
from fastdiff.samplers.dpm_multistep import dpm_multistep
from fastdiff.samplers.dpm_singlestep import dpm_singlestep
from fastdiff.samplers.dpm_solver import (
    dpm_solver_2,
    dpm_solver_3,
    dpmpp_1s,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    dpmpp_2s_ancestral,
    dpmpp_3m,
    dpmpp_3m_sde,
    dpmpp_sde,
)
from fastdiff.samplers.lms import lms
from fastdiff.samplers.pndm import pndm
from fastdiff.samplers.unipc import unipc

SAMPLERS: dict[str, Callable[..., Plan]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "lms": lms,
    "pndm": pndm,
    "dpm_multistep": dpm_multistep,
    "dpm_singlestep": dpm_singlestep,
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_3": dpm_solver_3,
    "dpmpp_1s": dpmpp_1s,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "deis": deis,
    "unipc": unipc,
}

__all__ = [
    "SAMPLERS", "ddim", "ddpm", "deis", "dpm_multistep", "dpm_singlestep", "dpm_solver_2", "dpm_solver_3", "dpmpp_1s",
    "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "dpmpp_2s_ancestral", "dpmpp_3m", "dpmpp_3m_sde", "dpmpp_sde", "lms",
    "pndm", "unipc",
]  # fmt: skip
