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
        order: 1 to 3; the first rows, and one that leaves or reaches an infinite λ, have less.
    """
    return replace(dpm_multistep(**locals(), algorithm="dpmsolver", solver_type="exact"), name="deis")
