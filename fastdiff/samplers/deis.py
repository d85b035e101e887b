"""DEIS, the exponential integrator with polynomial extrapolation (Zhang & Chen 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastdiff.plan.plan import Plan
from fastdiff.samplers.dpm_multistep import dpm_multistep
from fastdiff.schedules.spacing import Schedule


def deis(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    order: int = 2,
    lower_order_final: bool = True,
    **walk: Any,
) -> Plan:
    """x'/α' = x/α + ∫ ε dρ over ρ = σ/α, ε a polynomial in ln ρ through the last outputs (log-ρ-AB-DEIS, Equation 14).

    Since λ = −ln ρ, this is multistep DPM-Solver with the polynomial integrated exactly.

    Args:
        schedule, steps, prediction, clip, order (1 … 3), lower_order_final, walk: as for ``dpm_multistep``.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    plan = dpm_multistep(
        schedule, steps, prediction=prediction, clip=clip, order=order, algorithm="dpmsolver", solver_type="exact",
        lower_order_final=lower_order_final, **walk,
    )  # fmt: skip
    return replace(plan, name="deis")
