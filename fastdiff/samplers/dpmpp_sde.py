"""DPM-Solver++ with noise (the SDE samplers of k-diffusion): Lu et al. 2022b, Section 5.

Noise is drawn by (stream, row). A Brownian tree's also depends on σ, so that images of different numbers of steps
resemble one another there: here they do not.
"""

from __future__ import annotations

from dataclasses import replace

from fastdiff.plan.plan import Plan
from fastdiff.samplers.dpm_multistep import dpm_multistep
from fastdiff.samplers.dpm_singlestep import dpm_singlestep
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.spacing import Spacing


def dpmpp_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Plan:
    """k-diffusion's DPM-Solver++ SDE: two calls a step, noise in both (``dpm_singlestep``).

    Args:
        steps: levels that a step leads from and to; None visits every timestep of a NoiseSchedule.
        r: where the second call lies, at λ + r h.
    """
    return replace(dpm_singlestep(**locals(), order=2, stages="inserted"), name="dpmpp_sde")


def dpmpp_2m_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Plan:
    """DPM-Solver++(2M) SDE, as in k-diffusion and diffusers (``dpm_multistep``)."""
    return replace(dpm_multistep(**locals(), order=2), name="dpmpp_2m_sde")


def dpmpp_3m_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    solver_type: str = "heun",
    lower_order_final: bool = False,
    euler_at_final: bool = False,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Plan:
    """DPM-Solver++(3M) SDE, as in k-diffusion (``dpm_multistep``)."""
    return replace(dpm_multistep(**locals(), order=3), name="dpmpp_3m_sde")
