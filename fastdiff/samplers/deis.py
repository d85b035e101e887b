"""DEIS, the exponential integrator with polynomial extrapolation (Zhang & Chen 2023)."""

from __future__ import annotations

from dataclasses import replace

from fastdiff.plan.plan import Plan
from fastdiff.samplers.dpm_multistep import dpm_multistep
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.spacing import Spacing


def deis(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    order: int = 2,
    lower_order_final: bool = True,
) -> Plan:
    """x'/α' = x/α + ∫ ε dρ over ρ = σ/α, ε a polynomial in ln ρ through the last outputs (log-ρ-AB-DEIS, Equation 14).

    Since λ = −ln ρ, this is multistep DPM-Solver with the polynomial integrated exactly. Every spacing ends at the
    image: the lists of diffusers' DEISMultistepScheduler for Karras' σ, flows and the like end with their last σ twice,
    so that the last network call moves nothing and that much noise stays in the picture.

    Args:
        schedule: a NoiseSchedule, EDMSchedule or FlowSchedule.
        steps: network calls; None visits every timestep of a NoiseSchedule.
        prediction: what the network predicts (``schedules.level.x0_terms``). clip: the bound of |x̂_0|, None for none.
        spacing: where to stop, a name or a ``Spacing``; None is the schedule's own: trailing, or karras for EDM.
        order: 1 to 3; the first rows, and one that leaves or reaches an infinite λ, have less.
        lower_order_final: in fewer than 15 steps the last is first order and the one before it at most second.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    plan = dpm_multistep(
        schedule, steps, prediction=prediction, clip=clip, spacing=spacing, order=order, algorithm="dpmsolver",
        solver_type="exact", lower_order_final=lower_order_final,
    )  # fmt: skip
    return replace(plan, name="deis")
