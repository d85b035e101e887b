"""Multistep DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b), deterministic and with noise.

The formulas stand in ``samplers.exponential``. The last output or two come from slots: one network call a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fastdiff.checks import check_choice, check_clip, check_int, check_number
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.exponential import (
    blend,
    data_step,
    first_step,
    history,
    init_sigma,
    make_row,
    model_terms,
    node,
    noise_step,
    past,
    warm_up,
)
from fastdiff.schedules.level import Level, Schedule
from fastdiff.schedules.spacing import Spacing, levels

ALGORITHMS = ("dpmsolver++", "dpmsolver")
SOLVER_TYPES = ("midpoint", "heun", "exact")


def dpm_multistep(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Plan:
    """Multistep DPM-Solver(++) of any order, in every form of today's libraries; ``dpm_solver`` names them.

    Args:
        order: 1 (DDIM), 2 or 3: row i reads the outputs of rows i − 1 and i − 2. The first rows, and one that leaves
            or reaches an infinite λ, have less.
        algorithm: "dpmsolver++" integrates x̂_0, "dpmsolver" ε; a row that leaves a level without signal, where ε
            says nothing of x_0, is of first order in x̂_0.
        solver_type: order 2's slope weighs half the step ("midpoint": Lu et al. 2022b, Algorithm 2) or is integrated
            ("heun"). Under both, order 3 is the published one, which has half of its quadratic's integral and therefore
            converges with order 2. "exact" integrates the whole polynomial, with order 3.
        eta: the share of the SDE's noise. 1 is "sde-dpmsolver++" ("sde-dpmsolver") of diffusers. For x̂_0 h grows
            by η h (k-diffusion's η); for ε the drift and the noise's variance grow by the share η.
        s_noise: a factor of the noise. It is drawn by (stream, row); a Brownian tree's noise also depends on σ,
            so that images of different steps resemble one another there: here they do not.

    Raises:
        TypeError, ValueError: for arguments outside these; where ε is to end without noise under eta > 0.
    """
    check_int("order", order, 1, 3)
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    check_number("eta", eta, 0, 1)
    check_number("s_noise", s_noise, 0)
    bound, noise_form = check_clip(clip), algorithm == "dpmsolver"
    stops = levels(schedule, steps, spacing)
    count = len(stops) - 1
    orders = warm_up(stops, order)
    if lower_order_final and count < 15:
        orders = [min(n, count - i) for i, n in enumerate(orders)]
    if euler_at_final or stops[-1].sigma == 0:
        orders[-1] = 1
    rows = multistep_rows(stops, orders, prediction, bound, noise_form, solver_type, eta, s_noise)
    return Plan(rows, name="dpm_multistep", init_sigma=init_sigma(stops[0]))


def multistep_rows(
    stops: Sequence[Level],
    orders: Sequence[int],
    prediction: str,
    bound: float,
    noise_form: bool,
    solver_type: str,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> tuple[Row, ...]:
    """The rows of steps of these orders, from level to level, down in σ or, without noise, up."""
    rows = []
    for i, (reads, write) in enumerate(history([n - 1 for n in orders])):
        here, there, used = stops[i], stops[i + 1], orders[i] - 1
        output = model_terms(noise_form, prediction, here, bound)
        if there.ratio == here.ratio:  # x stays as it is
            rows.append(make_row(here, prediction, bound, {"x": 1.0}, slot=output, reads=reads, write=write))
            continue
        if noise_form and here.alpha == 0:
            rows.append(make_row(here, prediction, bound, first_step(here, there, eta, s_noise)))
            continue
        rule = "published" if used == 2 and solver_type != "exact" else solver_type
        if any(a.ratio == b.ratio for a, b in pairwise(stops[i - used : i + 1])):
            used = 0  # no slope between two outputs at one σ
        nodes = [node(stops[i - k], here, there) for k in range(1, used + 1)]
        if noise_form:
            step = noise_step(here, there, used, rule, eta)
        else:
            step = data_step(here, there, used, rule, eta * (there.log_snr - here.log_snr) if eta else 0.0)
        now, *before = step.outputs(nodes)
        x = blend((step.keep, {"x": 1.0}), (now, output), *past(before), (step.noise * s_noise, {"z": 1.0}))
        rows.append(make_row(here, prediction, bound, x, slot=output, reads=reads, write=write))
    return tuple(rows)
