"""Samplers: functions of a noise schedule that return a ``Plan``. Adding one is adding numbers, a page each."""

from collections.abc import Callable

from fastdiff.plan.plan import Plan
from fastdiff.samplers.ddim import ddim
from fastdiff.samplers.ddim_inverse import ddim_inverse
from fastdiff.samplers.ddpm import ddpm
from fastdiff.samplers.deis import deis
from fastdiff.samplers.described import describe
from fastdiff.samplers.dpm2 import dpm2, dpm2_ancestral
from fastdiff.samplers.dpm_multistep import dpm_multistep
from fastdiff.samplers.dpm_singlestep import dpm_singlestep
from fastdiff.samplers.dpm_solver import dpm_solver_2, dpm_solver_3
from fastdiff.samplers.dpmpp import dpmpp_1s, dpmpp_2m, dpmpp_2s, dpmpp_2s_ancestral, dpmpp_3m
from fastdiff.samplers.dpmpp_sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde
from fastdiff.samplers.euler import euler
from fastdiff.samplers.euler_ancestral import euler_ancestral
from fastdiff.samplers.flow_sde import flow_sde
from fastdiff.samplers.heun import heun
from fastdiff.samplers.ipndm import ipndm
from fastdiff.samplers.lcm import lcm
from fastdiff.samplers.lms import lms
from fastdiff.samplers.pndm import pndm
from fastdiff.samplers.repaint import repaint
from fastdiff.samplers.restart import restart
from fastdiff.samplers.sa_solver import sa_solver
from fastdiff.samplers.tcd import tcd
from fastdiff.samplers.unipc import unipc

SAMPLERS: dict[str, Callable[..., Plan]] = {
    sampler.__name__: sampler
    for sampler in (
        ddpm, ddim, ddim_inverse, euler, euler_ancestral, heun, dpm2, dpm2_ancestral, lms, pndm, ipndm,
        dpm_multistep, dpm_singlestep, dpm_solver_2, dpm_solver_3, dpmpp_1s, dpmpp_2s, dpmpp_2s_ancestral,
        dpmpp_sde, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, deis, unipc, sa_solver, flow_sde, lcm, tcd,
        restart, repaint,
    )
}  # fmt: skip
for sampler in SAMPLERS.values():
    describe(sampler)

__all__ = [
    "SAMPLERS", "ddim", "ddim_inverse", "ddpm", "deis", "dpm2", "dpm2_ancestral", "dpm_multistep", "dpm_singlestep",
    "dpm_solver_2", "dpm_solver_3", "dpmpp_1s", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "dpmpp_2s_ancestral",
    "dpmpp_3m", "dpmpp_3m_sde", "dpmpp_sde", "euler", "euler_ancestral", "flow_sde", "heun", "ipndm", "lcm", "lms",
    "pndm", "repaint", "restart", "sa_solver", "tcd", "unipc",
]  # fmt: skip
