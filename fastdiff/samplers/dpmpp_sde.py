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
        schedule: a NoiseSchedule, EDMSchedule or FlowSchedule.
        steps: levels that a step leads from and to; None visits every timestep of a NoiseSchedule.
        prediction: what the network predicts (``schedules.level.x0_terms``). clip: the bound of |x̂_0|, None for none.
        spacing: where to stop, a name or a ``Spacing``; None is the schedule's own: trailing, or karras for EDM.
        eta: 0 ≤ η ≤ 1, the share of the SDE's noise. s_noise: a factor of the noise.
        r: where the second call lies, at λ + r h.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    plan = dpm_singlestep(
        schedule, steps, prediction=prediction, clip=clip, spacing=spacing, order=2, stages="inserted", eta=eta,
        s_noise=s_noise, r=r,
    )  # fmt: skip
    return replace(plan, name="dpmpp_sde")


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
    """DPM-Solver++(2M) SDE, as in k-diffusion and diffusers (``dpm_multistep``).

    Args:
        schedule: a NoiseSchedule, EDMSchedule or FlowSchedule.
        steps: network calls; None visits every timestep of a NoiseSchedule.
        prediction: what the network predicts (``schedules.level.x0_terms``). clip: the bound of |x̂_0|, None for none.
        spacing: where to stop, a name or a ``Spacing``; None is the schedule's own: trailing, or karras for EDM.
        solver_type: how the slope of order 2 enters: "midpoint" (half the step, as published), "heun" (integrated) or
            "exact", which integrates order 3's parabola, too.
        lower_order_final: in fewer than 15 steps the last is first order and the one before it at most second.
        euler_at_final: the last step is first order in any number. It always is where it ends without noise.
        eta: 0 ≤ η ≤ 1, the share of the SDE's noise. s_noise: a factor of the noise.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    plan = dpm_multistep(
        schedule, steps, prediction=prediction, clip=clip, spacing=spacing, order=2, solver_type=solver_type,
        lower_order_final=lower_order_final, euler_at_final=euler_at_final, eta=eta, s_noise=s_noise,
    )  # fmt: skip
    return replace(plan, name="dpmpp_2m_sde")


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
    """DPM-Solver++(3M) SDE, as in k-diffusion (``dpm_multistep``).

    Args:
        schedule: a NoiseSchedule, EDMSchedule or FlowSchedule.
        steps: network calls; None visits every timestep of a NoiseSchedule.
        prediction: what the network predicts (``schedules.level.x0_terms``). clip: the bound of |x̂_0|, None for none.
        spacing: where to stop, a name or a ``Spacing``; None is the schedule's own: trailing, or karras for EDM.
        solver_type: how the slope of order 2 enters: "midpoint" (half the step, as published), "heun" (integrated) or
            "exact", which integrates order 3's parabola, too.
        lower_order_final: in fewer than 15 steps the last is first order and the one before it at most second.
        euler_at_final: the last step is first order in any number. It always is where it ends without noise.
        eta: 0 ≤ η ≤ 1, the share of the SDE's noise. s_noise: a factor of the noise.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    plan = dpm_multistep(
        schedule, steps, prediction=prediction, clip=clip, spacing=spacing, order=3, solver_type=solver_type,
        lower_order_final=lower_order_final, euler_at_final=euler_at_final, eta=eta, s_noise=s_noise,
    )  # fmt: skip
    return replace(plan, name="dpmpp_3m_sde")
