"""DPM-Solver (Lu et al. 2022a), which integrates ε: ``dpm_singlestep`` or ``dpm_multistep``, some arguments decided."""

from __future__ import annotations

from dataclasses import replace

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
        schedule: a NoiseSchedule, EDMSchedule or FlowSchedule.
        steps: network calls (multistep), or levels that a step leads from and to; None visits every timestep of a
            NoiseSchedule.
        prediction: what the network predicts (``schedules.level.x0_terms``). clip: the bound of |x̂_0|, None for none.
        spacing: where to stop, a name or a ``Spacing``; None is the schedule's own: trailing, or karras for EDM.
        method: "singlestep", 2 calls a step, or "multistep", which reads earlier outputs.
        solver_type: "midpoint" (as published), "heun" or "exact": how a slope enters (``dpm_multistep``,
            ``dpm_singlestep``).
        stages: for "singlestep": "inserted" (the default), inner calls between the levels, or "listed", at them.
        lower_order_final: the last steps fall in order where the number of steps asks for it.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    check_choice("method", method, METHODS)
    if method == "multistep":
        if stages is not None:
            raise ValueError("stages goes with method='singlestep'; a multistep method has none")
        plan = dpm_multistep(
            schedule, steps, prediction=prediction, clip=clip, spacing=spacing, order=2, algorithm="dpmsolver",
            solver_type=solver_type, lower_order_final=lower_order_final,
        )  # fmt: skip
    else:
        plan = dpm_singlestep(
            schedule, steps, prediction=prediction, clip=clip, spacing=spacing, order=2, algorithm="dpmsolver",
            solver_type=solver_type, stages="inserted" if stages is None else stages,
            lower_order_final=lower_order_final,
        )  # fmt: skip
    return replace(plan, name="dpm_solver_2")


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
        schedule: a NoiseSchedule, EDMSchedule or FlowSchedule.
        steps: network calls (multistep), or levels that a step leads from and to; None visits every timestep of a
            NoiseSchedule.
        prediction: what the network predicts (``schedules.level.x0_terms``). clip: the bound of |x̂_0|, None for none.
        spacing: where to stop, a name or a ``Spacing``; None is the schedule's own: trailing, or karras for EDM.
        method: "singlestep", 3 calls a step, or "multistep", which reads earlier outputs.
        solver_type: "midpoint" (as published), "heun" or "exact": how a slope enters (``dpm_multistep``,
            ``dpm_singlestep``).
        stages: for "singlestep": "inserted" (the default), inner calls between the levels, or "listed", at them.
        lower_order_final: the last steps fall in order where the number of steps asks for it.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    check_choice("method", method, METHODS)
    if method == "multistep":
        if stages is not None:
            raise ValueError("stages goes with method='singlestep'; a multistep method has none")
        plan = dpm_multistep(
            schedule, steps, prediction=prediction, clip=clip, spacing=spacing, order=3, algorithm="dpmsolver",
            solver_type=solver_type, lower_order_final=lower_order_final,
        )  # fmt: skip
    else:
        plan = dpm_singlestep(
            schedule, steps, prediction=prediction, clip=clip, spacing=spacing, order=3, algorithm="dpmsolver",
            solver_type=solver_type, stages="inserted" if stages is None else stages,
            lower_order_final=lower_order_final,
        )  # fmt: skip
    return replace(plan, name="dpm_solver_3")
