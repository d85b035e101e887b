"""RePaint's resampling schedule (Lugmayr et al. 2022): an inpainting run goes back up in noise, again and again."""

from __future__ import annotations

from dataclasses import replace

from fastdiff.checks import check_int
from fastdiff.plan.plan import Plan
from fastdiff.samplers.ddim import ddim
from fastdiff.samplers.ddpm import ddpm
from fastdiff.samplers.stages import noised
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.spacing import Spacing


def repaint(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    eta: float | None = None,
    variance: str | None = None,
) -> Plan:
    """DDPM, or DDIM where ``eta`` is given, with RePaint's jumps; ``sample`` has the mask and the known image.

    Args:
        steps: how many timesteps to visit, all T of a NoiseSchedule by default; the paper takes 250.
        spacing: where to stop, a name or a ``Spacing``; None is leading, or the schedule's own where it has no table.
        jump_length, jump_n_sample: j and r of the paper (``resampled``).
        eta: DDIM's η; None takes DDPM, as the paper does, with ``variance``, by default "fixed_small".
    """
    if eta is None:
        variance = "fixed_small" if variance is None else variance
        base = ddpm(schedule, steps, prediction=prediction, clip=clip, spacing=spacing, variance=variance)
    elif variance is not None:
        raise ValueError("variance is DDPM's and eta DDIM's; give one of them")
    else:
        base = ddim(schedule, steps, prediction=prediction, clip=clip, spacing=spacing, eta=eta)
    return replace(resampled(base, jump_length, jump_n_sample), name="repaint")


def resampled(plan: Plan, jump_length: int = 10, jump_n_sample: int = 10) -> Plan:
    """The rows of ``plan`` in the order of RePaint's schedule, with its jumps between them.

    At every jump_length-th level, counted from the last row's start and short of the first, the walk jumps back by
    jump_length levels, jump_n_sample − 1 times, before it goes on. A jump is one row without a network call,

        x_t = (α_t/α_s) x_s + √(σ_t² − (α_t/α_s)² σ_s²) z,

    which has the law of the paper's jump_length single steps (its Equation 1 applied so often). Each row draws noise of
    its own. Raises ValueError for a plan whose rows are not one network call each, without a history.
    """
    check_int("jump_length", jump_length, 1, 1 << 20)
    check_int("jump_n_sample", jump_n_sample, 1, 1 << 20)
    if plan.slots_used or plan.uses_anchor or not all(row.calls_model for row in plan):
        raise ValueError(
            f"the plan {plan.name!r} has rows that are not one step each; RePaint needs one such as DDPM's"
        )
    last = len(plan) - 1
    jumps = dict.fromkeys(range(0, last + 1 - jump_length, jump_length), jump_n_sample - 1)
    rows, level = [plan[0]], last - 1  # the level's number: that of the rows still to come after the next
    while level >= 0:
        if jumps.get(level, 0):
            jumps[level] -= 1
            rows.append(noised(plan[last - level], plan[last - level - jump_length]))
            level += jump_length
        rows.append(plan[last - level])
        level -= 1
    return replace(plan, rows=tuple(rows))
