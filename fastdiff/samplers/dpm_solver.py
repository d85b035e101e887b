"""The samplers of the DPM-Solver family by the names that they are known by (Lu et al. 2022a, 2022b; k-diffusion).

Multistep ones call ``dpm_multistep``, singlestep ones ``dpm_singlestep``, where the arguments are described.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

from fastdiff.levels import check_clip
from fastdiff.plan import Plan
from fastdiff.samplers.dpm_multistep import dpm_multistep
from fastdiff.samplers.dpm_singlestep import dpm_singlestep, grown_by, inserted, step_rows
from fastdiff.samplers.exponential import blend, check_choice, check_share, init_sigma
from fastdiff.samplers.spacing import Schedule, levels

METHODS = ("singlestep", "multistep")


def dpmpp_1s(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    **walk: Any,
) -> Plan:
    """DPM-Solver++(1), which is DDIM at η = 0 (Lu et al. 2022b, Section 4)."""
    return replace(dpm_multistep(schedule, steps, prediction=prediction, clip=clip, order=1, **walk), name="dpmpp_1s")


def dpmpp_2s(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    solver_type: str = "midpoint",
    stages: str = "inserted",
    lower_order_final: bool = True,
    **walk: Any,
) -> Plan:
    """DPM-Solver++(2S) (Lu et al. 2022b, Algorithm 1); the arguments are those of ``dpm_singlestep``."""
    plan = dpm_singlestep(
        schedule, steps, prediction=prediction, clip=clip, order=2, solver_type=solver_type, stages=stages,
        lower_order_final=lower_order_final, **walk,
    )  # fmt: skip
    return replace(plan, name="dpmpp_2s")


def dpmpp_2s_ancestral(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    **walk: Any,
) -> Plan:
    """k-diffusion's: a step of DPM-Solver++(2S) down to σ_down, with its middle there, then noise up to σ'.

    Args:
        schedule, steps, prediction, clip, eta, s_noise, walk: as for ``dpm_singlestep``.
    """
    check_share("eta", eta)
    check_share("s_noise", s_noise, math.inf)
    bound = check_clip(clip)
    points = levels(schedule, steps, **walk)
    rows = []
    for here, there in pairwise(points):
        extra = grown_by(there.log_snr - here.log_snr, eta) if eta else 0.0
        down = replace(there, sigma=there.sigma * math.exp(-extra))
        group, shares = inserted(schedule, here, down, (0.5,), walk)
        *inner, last = step_rows(group, shares, prediction, bound, False, ["midpoint"] * 2, 0.0, 0.0)
        noise = s_noise * there.sigma * math.sqrt(-math.expm1(-2 * extra))
        rows += [*inner, replace(last, x=blend((1.0, last.x), (noise, {"z": 1.0})))]
    return Plan(tuple(rows), name="dpmpp_2s_ancestral", init_sigma=init_sigma(points[0]))


def dpmpp_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    **walk: Any,
) -> Plan:
    """k-diffusion's DPM-Solver++ SDE: two calls a step, noise in both; the arguments are ``dpm_singlestep``'s."""
    plan = dpm_singlestep(
        schedule, steps, prediction=prediction, clip=clip, order=2, stages="inserted", eta=eta, s_noise=s_noise, r=r,
        **walk,
    )  # fmt: skip
    return replace(plan, name="dpmpp_sde")


def dpmpp_2m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **walk: Any,
) -> Plan:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2); the arguments are those of ``dpm_multistep``."""
    plan = dpm_multistep(
        schedule, steps, prediction=prediction, clip=clip, order=2, solver_type=solver_type,
        lower_order_final=lower_order_final, euler_at_final=euler_at_final, **walk,
    )  # fmt: skip
    return replace(plan, name="dpmpp_2m")


def dpmpp_3m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **walk: Any,
) -> Plan:
    """DPM-Solver++(3M); the arguments are those of ``dpm_multistep``, whose solver_type="exact" has order 3."""
    plan = dpm_multistep(
        schedule, steps, prediction=prediction, clip=clip, order=3, solver_type=solver_type,
        lower_order_final=lower_order_final, euler_at_final=euler_at_final, **walk,
    )  # fmt: skip
    return replace(plan, name="dpmpp_3m")


def dpmpp_2m_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **walk: Any,
) -> Plan:
    """DPM-Solver++(2M) SDE, as in k-diffusion and diffusers; the arguments are those of ``dpm_multistep``."""
    plan = dpm_multistep(
        schedule, steps, prediction=prediction, clip=clip, order=2, eta=eta, s_noise=s_noise, solver_type=solver_type,
        lower_order_final=lower_order_final, euler_at_final=euler_at_final, **walk,
    )  # fmt: skip
    return replace(plan, name="dpmpp_2m_sde")


def dpmpp_3m_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "heun",
    lower_order_final: bool = False,
    euler_at_final: bool = False,
    **walk: Any,
) -> Plan:
    """DPM-Solver++(3M) SDE, as in k-diffusion; the arguments are those of ``dpm_multistep``."""
    plan = dpm_multistep(
        schedule, steps, prediction=prediction, clip=clip, order=3, eta=eta, s_noise=s_noise, solver_type=solver_type,
        lower_order_final=lower_order_final, euler_at_final=euler_at_final, **walk,
    )  # fmt: skip
    return replace(plan, name="dpmpp_3m_sde")


def dpm_solver_2(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    method: str = "singlestep",
    solver_type: str = "midpoint",
    stages: str | None = None,
    lower_order_final: bool = True,
    **walk: Any,
) -> Plan:
    """DPM-Solver-2 (Lu et al. 2022a, Algorithm 1), which integrates ε.

    Args:
        method: "singlestep", with ``stages`` "inserted" (the default) or "listed", or "multistep", without.
        schedule, steps, prediction, clip, solver_type, lower_order_final, walk: as for ``dpm_multistep``.
    """
    options = {"prediction": prediction, "clip": clip, "solver_type": solver_type, **walk}
    return _noise_form("dpm_solver_2", 2, schedule, steps, method, stages, lower_order_final, options)


def dpm_solver_3(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    method: str = "singlestep",
    solver_type: str = "midpoint",
    stages: str | None = None,
    lower_order_final: bool = True,
    **walk: Any,
) -> Plan:
    """DPM-Solver-3 (Lu et al. 2022a, Algorithm 2); the arguments are those of ``dpm_solver_2``."""
    options = {"prediction": prediction, "clip": clip, "solver_type": solver_type, **walk}
    return _noise_form("dpm_solver_3", 3, schedule, steps, method, stages, lower_order_final, options)


def _noise_form(
    name: str, order: int, schedule: Schedule, steps: int | None, method: str, stages: str | None, lower: bool,
    options: dict[str, Any],
) -> Plan:  # fmt: skip
    check_choice("method", method, METHODS)
    options |= {"order": order, "algorithm": "dpmsolver", "lower_order_final": lower}
    if method == "multistep":
        if stages is not None:
            raise ValueError("stages goes with method='singlestep'; a multistep method has none")
        return replace(dpm_multistep(schedule, steps, **options), name=name)
    return replace(dpm_singlestep(schedule, steps, stages=stages or "inserted", **options), name=name)
