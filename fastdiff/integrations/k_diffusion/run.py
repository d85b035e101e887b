"""What k-diffusion's samplers share: a plan run on its model, with its noise and its callback."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdiff import samplers
from fastdiff.integrations.common import has_source, run_from, steps_of
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.stages import Churn, call, heun_rows, moved
from fastdiff.sampling.noise_source import NoiseFunction
from fastdiff.sampling.sample import sample, sample_iter
from fastdiff.schedules.continuous import EDMSchedule
from fastdiff.schedules.spacing import Spacing

Model = Callable[..., Tensor]
Arguments = Mapping[str, Any] | None
Callback = Callable[[dict[str, Any]], Any] | None
Noise = Callable[[Tensor, Tensor], Tensor] | None


def sample_along(sampler: Callable[..., Plan], given: dict[str, Any], **own: Any) -> Tensor:
    """Run a sampler along ``sigmas``; ``given`` are its function's arguments, those not named here its own."""
    common = {
        name: given.pop(name) for name in ("model", "x", "sigmas", "extra_args", "callback", "disable", "options")
    }
    noise_sampler, sigmas = given.pop("noise_sampler", None), common["sigmas"]
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        raise TypeError(f"sigmas must be a tensor of one dimension; got {sigmas!r}")
    values = sigmas.tolist()
    if all(a > b for a, b in pairwise(values)):
        plan = sampler(EDMSchedule(), prediction="sample", spacing=Spacing(sigmas=values), **own, **given)
    elif sampler in ANY_ORDER:
        plan = in_any_order(sampler, values, Churn(**given))
    else:
        raise ValueError(
            f"sigmas must fall for {sampler.__name__}, where those of sample_euler, sample_heun and sample_dpm_2 may"
            f" rise and repeat; got {values}"
        )
    return run(plan, **common, noise_sampler=noise_sampler)


ANY_ORDER = (samplers.euler, samplers.heun, samplers.dpm2)


def in_any_order(sampler: Callable[..., Plan], sigmas: Sequence[float], churn: Churn) -> Plan:
    """The sampler's plan where σ rise, as they do from an image to its noise, or repeat."""
    if len(sigmas) < 2 or not all(0 < sigma < math.inf for sigma in sigmas[:-1]) or not 0 <= sigmas[-1] < math.inf:
        raise ValueError(f"sigmas must be two or more, finite and positive but for the last, 0 or more; got {sigmas}")
    schedule, rows = EDMSchedule(), list[Row]()
    stops = [schedule.at(sigma) for sigma in sigmas]
    for here, there in pairwise(stops):
        added, here = churn.raise_noise(schedule, here, len(stops) - 1, False)
        rows += added
        if sampler is samplers.euler or there.sigma == 0:
            rows.append(call(here, "sample", math.inf, moved(here, 1.0, there.sigma)))
        elif sampler is samplers.heun:
            rows += heun_rows(here, there, "sample", math.inf)
        else:
            middle = schedule.at(math.sqrt(here.sigma * there.sigma))
            slope = (there.sigma - here.sigma) / middle.sigma
            rows.append(call(here, "sample", math.inf, moved(here, 1.0, middle.sigma), {"x": 1.0}))
            rows.append(call(middle, "sample", math.inf, {"anchor": 1.0, "x": slope, "x0": -slope}))
    return Plan(tuple(rows), name=sampler.__name__, init_sigma=stops[0].sigma)


def denoiser(model: Model) -> Callable[..., Tensor]:
    """k-diffusion's model as a network of a plan that ``shown`` made."""
    if not callable(model):
        raise TypeError(f"model must be callable; got {type(model).__name__}")

    def denoise(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        return model(x, sigma.to(x.dtype), **kwargs)

    return denoise


def shown(plan: Plan) -> Plan:
    """The plan whose network is shown x itself and told σ."""
    return replace(plan, rows=tuple(replace(row, t=row.sigma, c_in=1.0) for row in plan))


def run(
    plan: Plan, *, model: Model, x: Tensor, sigmas: Tensor, extra_args: Arguments, callback: Callback,
    disable: bool | None, options: dict[str, Any], noise_sampler: Noise,
    info: Callable[[int], dict[str, Any]] | None = None,
) -> Tensor:  # fmt: skip
    """Run a plan of steps from each of ``sigmas`` to the next; ``info`` adds to what ``callback`` gets of a step."""
    denoise, plan = denoiser(model), shown(plan)
    steps = steps_of(plan)
    noise = _noise(plan, steps, x, sigmas, noise_sampler)
    if noise_sampler is not None:
        if has_source(options):
            raise ValueError("noise_sampler goes without another source of noise")
        options = {**options, "noise_fn": noise}
    show = not disable if disable is not None else sys.stderr.isatty()
    arguments = dict(sampler=plan, model_kwargs=extra_args, progress=show, **run_from(x, x.shape, options, noise))
    if callback is None:
        return sample(denoise, x.shape, **arguments).to(x.dtype)
    before, states = x, sample_iter(denoise, x.shape, **arguments)
    next(states)  # x itself
    for state in states:
        row, i = plan[state.row - 1], steps[state.row - 1]
        if row.calls_model and not row.uses("anchor"):
            hat = sigmas.new_tensor(row.sigma)  # beyond sigmas[i] where there was churn
            more = {} if info is None else info(i)
            callback({"x": before, "i": i, "sigma": sigmas[i], "sigma_hat": hat, "denoised": state.x0, **more})
        before = state.x
    return before.to(x.dtype)


def _noise(plan: Plan, steps: list[int], x: Tensor, sigmas: Tensor, noise_sampler: Noise) -> NoiseFunction:
    """The noise of each row, from ``noise_sampler`` or from torch's global generator."""
    count, first = 0, torch.empty(0)  # draws of churn, and the first draw of a step of two

    def noise(stream: int, row: int, shape: tuple[int, ...]) -> Tensor:
        nonlocal count, first
        i, churns = steps[row], not plan[row].calls_model
        middle = None if churns or row + 1 == len(plan) or steps[row + 1] != i else plan[row + 1].sigma
        if noise_sampler is not None:
            return noise_sampler(sigmas[i], sigmas[i + 1] if middle is None else sigmas.new_tensor(middle))
        z = torch.randn_like(x)
        while churns and count < i:  # the library draws in every step, whether or not it then adds noise
            z, count = torch.randn_like(x), count + 1
        if churns:
            count = i + 1
        elif middle is not None:
            first = z
        elif row and steps[row - 1] == i and plan[row - 1].uses("z"):
            # A Brownian path's increments to the step's middle and to its end share the first part.
            shared = (float(sigmas[i]) - plan[row].sigma) / (float(sigmas[i]) - float(sigmas[i + 1]))
            z = math.sqrt(shared) * first + math.sqrt(1 - shared) * z
        return z

    return noise
