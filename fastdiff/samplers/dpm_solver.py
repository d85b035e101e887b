"""The samplers of the DPM-Solver family by the names that they are known by (Lu et al. 2022a, 2022b; k-diffusion).

Multistep ones are ``dpm_multistep``, singlestep ones ``dpm_singlestep``, with some arguments decided; the others are
described there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from fastdiff.checks import check_choice, check_clip, check_number
from fastdiff.plan.plan import Plan
from fastdiff.samplers.dpm_multistep import dpm_multistep
from fastdiff.samplers.dpm_singlestep import dpm_singlestep, grown_by, inserted, step_rows
from fastdiff.samplers.exponential import blend, init_sigma
from fastdiff.schedules.spacing import Schedule, levels

METHODS = ("singlestep", "multistep")


def _named(name: str, solver: Callable[..., Plan], about: str, *without: str, **decided: Any) -> Callable[..., Plan]:
    """``solver`` by a name of its own, with ``decided`` as defaults; without order, algorithm and ``without``."""
    hidden = {"order", "algorithm", *without}
    signature = inspect.signature(solver)
    parameters = [
        parameter.replace(default=decided.get(key, parameter.default))
        for key, parameter in signature.parameters.items()
        if key not in hidden
    ]

    def sampler(schedule: Schedule, steps: int | None = None, **options: Any) -> Plan:
        refused = sorted(hidden & set(options))
        if refused:
            raise TypeError(f"{name} does not take {', '.join(refused)}; {solver.__name__} does")
        return replace(solver(schedule, steps, **{**decided, **options}), name=name)

    sampler.__name__ = sampler.__qualname__ = name
    sampler.__doc__ = f"{about}; the arguments are those of ``{solver.__name__}``."
    sampler.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return sampler


dpmpp_1s = _named(
    "dpmpp_1s", dpm_multistep, "DPM-Solver++(1), which is DDIM at η = 0 (Lu et al. 2022b, Section 4)",
    "eta", "s_noise", "solver_type", "lower_order_final", "euler_at_final", order=1,
)  # fmt: skip
dpmpp_2s = _named(
    "dpmpp_2s", dpm_singlestep, "DPM-Solver++(2S) (Lu et al. 2022b, Algorithm 1)",
    "eta", "s_noise", "r", "sizes", order=2, stages="inserted",
)  # fmt: skip
dpmpp_sde = _named(
    "dpmpp_sde", dpm_singlestep, "k-diffusion's DPM-Solver++ SDE: two calls a step, noise in both",
    "solver_type", "lower_order_final", "stages", "sizes", order=2, stages="inserted", eta=1.0,
)  # fmt: skip
dpmpp_2m = _named(
    "dpmpp_2m", dpm_multistep, "DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2)", "eta", "s_noise", order=2
)
dpmpp_3m = _named(
    "dpmpp_3m", dpm_multistep, 'DPM-Solver++(3M), of order 3 with solver_type="exact"', "eta", "s_noise", order=3
)
dpmpp_2m_sde = _named(
    "dpmpp_2m_sde", dpm_multistep, "DPM-Solver++(2M) SDE, as in k-diffusion and diffusers", order=2, eta=1.0
)
dpmpp_3m_sde = _named(
    "dpmpp_3m_sde", dpm_multistep, "DPM-Solver++(3M) SDE, as in k-diffusion", order=3, eta=1.0, solver_type="heun",
    lower_order_final=False,
)  # fmt: skip


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
    check_number("eta", eta, 0, 1)
    check_number("s_noise", s_noise, 0)
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
