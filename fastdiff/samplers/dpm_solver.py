"""DPM-Solver (Lu et al. 2022a), which integrates ε: ``dpm_singlestep`` or ``dpm_multistep``, some arguments decided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastdiff.checks import check_choice
from fastdiff.plan.plan import Plan
from fastdiff.samplers.dpm_multistep import dpm_multistep
from fastdiff.samplers.dpm_singlestep import dpm_singlestep
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.spacing import Spacing

METHODS = ("singlestep", "multistep")


def dpm_solver_2(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    method: str = "singlestep",
    solver_type: str = "midpoint",
    stages: str | None = None,
    lower_order_final: bool = True,
) -> Plan:
    """DPM-Solver-2 (Lu et al. 2022a, Algorithm 1), which integrates ε.

    Args:
        steps: network calls (multistep), or levels that a step leads from and to; None visits every timestep of a
            NoiseSchedule.
        method: "singlestep", 2 calls a step, or "multistep", which reads earlier outputs.
        solver_type: "midpoint" (as published), "heun" or "exact": how a slope enters (``dpm_multistep``,
            ``dpm_singlestep``).
        stages: for "singlestep": "inserted" (the default), inner calls between the levels, or "listed", at them.
        lower_order_final: the last steps fall in order where the number of steps asks for it.
    """
    return _dpm_solver(2, **locals())


def dpm_solver_3(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    method: str = "singlestep",
    solver_type: str = "midpoint",
    stages: str | None = None,
    lower_order_final: bool = True,
) -> Plan:
    """DPM-Solver-3 (Lu et al. 2022a, Algorithm 2), which integrates ε.

    Args:
        steps: network calls (multistep), or levels that a step leads from and to; None visits every timestep of a
            NoiseSchedule.
        method: "singlestep", 3 calls a step, or "multistep", which reads earlier outputs.
        solver_type: "midpoint" (as published), "heun" or "exact": how a slope enters (``dpm_multistep``,
            ``dpm_singlestep``).
        stages: for "singlestep": "inserted" (the default), inner calls between the levels, or "listed", at them.
        lower_order_final: the last steps fall in order where the number of steps asks for it.
    """
    return _dpm_solver(3, **locals())


def _dpm_solver(order: int, method: str, stages: str | None, **given: Any) -> Plan:
    check_choice("method", method, METHODS)
    given |= {"order": order, "algorithm": "dpmsolver"}
    if method == "singlestep":
        plan = dpm_singlestep(**given, stages="inserted" if stages is None else stages)
    elif stages is not None:
        raise ValueError("stages goes with method='singlestep'; a multistep method has none")
    else:
        plan = dpm_multistep(**given)
    return replace(plan, name=f"dpm_solver_{order}")
