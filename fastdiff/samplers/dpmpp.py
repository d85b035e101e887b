"""DPM-Solver++ (Lu et al. 2022b), which integrates x̂_0, without noise; and k-diffusion's ancestral form.

Multistep ones are ``dpm_multistep``, singlestep ones ``dpm_singlestep``, with some arguments decided.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from fastdiff.checks import check_clip, check_number
from fastdiff.plan.plan import Plan
from fastdiff.samplers.dpm_multistep import dpm_multistep
from fastdiff.samplers.dpm_singlestep import dpm_singlestep, grown_by, inserted, step_rows
from fastdiff.samplers.exponential import blend, init_sigma
from fastdiff.samplers.stages import timed
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.spacing import Spacing, levels


def dpmpp_1s(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
) -> Plan:
    """DPM-Solver++(1), which is DDIM at η = 0 (Lu et al. 2022b, Section 4)."""
    return replace(dpm_multistep(**locals(), order=1), name="dpmpp_1s")


def dpmpp_2s(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    stages: str = "inserted",
) -> Plan:
    """DPM-Solver++(2S), two calls a step (Lu et al. 2022b, Algorithm 1).

    Args:
        steps: levels that a step leads from and to; None visits every timestep of a NoiseSchedule.
        solver_type: the slope weighs half the step ("midpoint", as published), or is integrated ("heun", "exact").
        stages: "inserted": the second call lies halfway in λ; "listed": the calls' levels are the spacing's.
        lower_order_final: for "listed": end with a step of one call, so that any number of levels will do.
    """
    return replace(dpm_singlestep(**locals(), order=2), name="dpmpp_2s")


def dpmpp_2s_ancestral(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Plan:
    """k-diffusion's: a step of DPM-Solver++(2S) down to σ_down, with its middle there, then noise up to σ'.

    Args:
        steps: levels that a step leads from and to; None visits every timestep of a NoiseSchedule.
        eta: 0 ≤ η ≤ 1, the share of noise. s_noise: a factor of the noise.
    """
    check_number("eta", eta, 0, 1)
    check_number("s_noise", s_noise, 0)
    bound = check_clip(clip)
    quantize = Spacing.of(spacing).quantize
    stops = timed(levels(schedule, steps, spacing), quantize)
    rows = []
    for here, there in pairwise(stops):
        extra = grown_by(there.log_snr - here.log_snr, eta) if eta else 0.0
        down = replace(there, sigma=there.sigma * math.exp(-extra))
        group, shares = inserted(schedule, here, down, (0.5,), quantize)
        *inner, last = step_rows(group, shares, prediction, bound, False, ["midpoint"] * 2, 0.0, 0.0)
        noise = s_noise * there.sigma * math.sqrt(-math.expm1(-2 * extra))
        rows += [*inner, replace(last, x=blend((1.0, last.x), (noise, {"z": 1.0})))]
    return Plan(tuple(rows), name="dpmpp_2s_ancestral", init_sigma=init_sigma(stops[0]))


def dpmpp_2m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Plan:
    """DPM-Solver++(2M), which reads the last output, too (Lu et al. 2022b, Algorithm 2)."""
    return replace(dpm_multistep(**locals(), order=2), name="dpmpp_2m")


def dpmpp_3m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Plan:
    """DPM-Solver++(3M), which reads the last two outputs, too; of order 3 with solver_type="exact"."""
    return replace(dpm_multistep(**locals(), order=3), name="dpmpp_3m")
