"""The log-density of a step that a run took, with gradients to the network's parameters: what policy gradients need.

``sample(..., return_log_prob=True)`` has the same numbers from the pass that drew the steps; docs/logprob.md says what
is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_finite, check_int, kind_of
from fastdiff.ops.update.deviance import constant
from fastdiff.ops.update.reference import Inputs, learned_log_sigma, update
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import SLOTS, Row
from fastdiff.sampling.guidance import Scale
from fastdiff.sampling.model import eval_mode
from fastdiff.sampling.request import Request
from fastdiff.sampling.sample import bind
from fastdiff.sampling.state import State
from fastdiff.sampling.stepper import Stepper, plain_tensors


def log_prob(
    model: Callable[..., Any],
    state: State | Tensor,
    x_prev: State | Tensor,
    plan: Plan,
    row: int | None = None,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    guidance_scale: Scale = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    thresholding: float | tuple[float, float] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    device: torch.device | str | None = None,
    model_dtype: torch.dtype | None = None,
) -> Tensor:
    """log p(x_{t−1} | x_t) of one row of a plan, with gradients to what the network computes with.

    x_{t−1} is a Gaussian's whose mean, and under learned variance whose σ, the network's output gives. The network is
    called once, in eval mode as ``sample`` calls it; gradients are recorded where torch records them, by its own code
    where it was accelerated. States, and the history in a ``State``, are constants.

    Args:
        model: the network, as for ``fastdiff.sample``; so are the keywords, which must be those of the run.
        state: x_t [B, …], or the run's ``State`` before the row, which a row that reads a history (a multistep
            method's) needs.
        x_prev: x_{t−1} [B, …], or the ``State`` after the row.
        plan: the run's plan.
        row: the row's number, one of ``plan.noisy_rows``; None takes the state's.
        guidance_rescale, thresholding: without gradients alone (under ``torch.no_grad()``).

    Returns:
        float32 [B], the sum over an image's elements, added up in float64: divided by their number it is the mean that
        DDPO's and Flow-GRPO's code take (Black et al. 2023, Equation 3; Liu et al. 2025, Equation 9).

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it should be; for a row that draws nothing.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, such as fastdiff.samplers.ddpm(schedule); got {kind_of(plan)}")
    row = _row_of(state, plan, row)
    before, after = _before(state, plan, row), _after(x_prev)
    if after.shape != before.x.shape or after.device != before.x.device:
        raise ValueError(
            f"x_prev must be like the state, {list(before.x.shape)} on {before.x.device}; got {list(after.shape)} on "
            f"{after.device}"
        )
    check_finite("x_prev", after)
    if torch.is_grad_enabled() and (guidance_rescale or thresholding is not None):
        name = "guidance_rescale" if guidance_rescale else "thresholding"
        raise ValueError(f"{name} has no gradient here: leave it out, or call log_prob under torch.no_grad()")
    bound = bind(
        model, tuple(before.x.shape), sampler=plan, resume=before, model_kwargs=model_kwargs,
        uncond_kwargs=uncond_kwargs, guidance_scale=guidance_scale, guidance_rescale=guidance_rescale,
        guidance_interval=guidance_interval, thresholding=thresholding, cond_fn=cond_fn, device=device,
        model_dtype=model_dtype, backend="reference", cuda_graph=False,
    )  # fmt: skip
    bound.apply_defaults()
    with plain_tensors():
        stepper = Stepper(Request.of(*bound.args, **bound.kwargs))
    with eval_mode(model):
        return _log_prob(stepper, row, after)


def _log_prob(stepper: Stepper, row: int, x_prev: Tensor) -> Tensor:
    """Of the row that a stepper of the reference backend stands before."""
    r, variance = stepper.plan.rows[row], None
    if r.calls_model:
        variance = stepper.call(stepper.row_times[row], row, stepper.calls[row])
        if stepper.request.classifier is not None and r.uses("g"):
            stepper.guide(r, row, variance)
    o = (stepper.update if r.calls_model else stepper.change).operands
    assert o.host_table is not None
    mean = update(
        o.host_table[row],
        Inputs(o.x, o.outputs, None, o.anchor, tuple(o.slots), torch.zeros_like(o.x), o.gain, o.clip, o.gradient),
    ).x
    coefficient, elements = r.x["z"], o.x[:1].numel()
    z = (x_prev - mean) / coefficient
    deviance = z.square()
    if variance is not None and r.log_variance is not None:
        log_sigma = learned_log_sigma(variance.to(torch.float32), *r.log_variance)
        deviance = deviance * (log_sigma * -2.0).exp() + 2.0 * log_sigma
    total = deviance.flatten(1).sum(1, dtype=torch.float64)
    return ((total + constant(coefficient, elements)) * -0.5).to(torch.float32)


def _row_of(state: State | Tensor, plan: Plan, row: int | None) -> int:
    """The row's number, which must draw."""
    if row is None:
        if not isinstance(state, State):
            raise ValueError("row must say which row of the plan leads on from the state; only a State knows it itself")
        row = state.row
    row = check_int("row", row, 0, len(plan) - 1)
    if isinstance(state, State) and state.row != row:
        raise ValueError(f"row is {row}, but the state stands before row {state.row}")
    if row not in plan.noisy_rows:
        raise ValueError(
            f"row {row} of the plan {plan.name!r} is deterministic: its x' follows from x and has no density; "
            f"plan.noisy_rows has those that draw, {_listed(plan.noisy_rows)}"
        )
    if plan[row].reuse is not None:
        raise ValueError(
            f"row {row} of the plan {plan.name!r} reuses what an earlier call made, and a gradient would have to run "
            "through that call: take a plan without reuse, or sample's return_log_prob"
        )
    return row


def _listed(rows: tuple[int, ...]) -> str:
    return "none" if not rows else ", ".join(map(str, rows[:3])) + (f" … {rows[-1]}" if len(rows) > 3 else "")


def _before(state: State | Tensor, plan: Plan, row: int) -> State:
    """The state before the row as ``resume=`` takes it, whatever noise led there."""
    if isinstance(state, State):
        return replace(state, x=_constant("state.x", state.x), noise=None)
    x = _constant("state", state)
    reads = _history(plan[row])
    if reads:
        raise ValueError(f"row {row} of the plan {plan.name!r} reads {reads}: give the State that the run stood in")
    anchor = torch.zeros_like(x) if plan.uses_anchor else None
    slots = tuple(torch.zeros_like(x) if k in plan.slots_used else None for k in range(SLOTS))
    return State(x, None, anchor, slots, row)


def _history(row: Row) -> str:
    """What a row's x' reads of earlier rows, in words."""
    slots = [f"slot {slot}" for k, slot in enumerate(row.reads) if row.x.get(f"slot{k}")]
    return " and ".join([*(["the anchor"] if row.x.get("anchor") else []), *slots])


def _after(x_prev: State | Tensor) -> Tensor:
    if isinstance(x_prev, State):
        return _constant("x_prev.x", x_prev.x)
    return _constant("x_prev", x_prev)


def _constant(name: str, x: Any) -> Tensor:
    """A state, float32: a tensor to which no gradient is asked for."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor or a State; got {kind_of(x)}")
    if x.requires_grad:
        raise ValueError(f"{name} requires a gradient, but states are constants of log_prob: give {name}.detach()")
    return x.to(torch.float32)
