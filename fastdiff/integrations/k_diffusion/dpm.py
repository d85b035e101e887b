"""k-diffusion's DPM-Solver of mixed orders in a number of calls, and of 12 and 23 with steps of adapted size.

Both are ``samplers.dpm_singlestep``'s steps in t = −ln σ, with noise above σ_down where eta > 0. An adaptive run is a
loop around plans of one step, whose last row also writes what a step of the lower order leads to.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_device, check_int, check_number, check_positive
from fastdiff.integrations.common import SOURCES, has_source, run_from
from fastdiff.integrations.k_diffusion.run import Arguments, Callback, Model, Noise, denoiser, run, shown
from fastdiff.ops.backend import choose
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.samplers.dpm_singlestep import grown_by, inserted, step_rows
from fastdiff.samplers.exponential import blend, noise_step
from fastdiff.sampling.noise_source import resolve_noise_source
from fastdiff.sampling.sample import sample_iter
from fastdiff.schedules.continuous import EDMSchedule

SCHEDULE = EDMSchedule()
INNER = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}
LOW = 1  # the slot of what a step of the lower order leads to


def sample_dpm_fast(
    model: Model, x: Tensor, sigma_min: float, sigma_max: float, n: int, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: Noise = None, **options: Any,
) -> Tensor:  # fmt: skip
    """DPM-Solver-fast (Lu et al. 2022a, Section 3.4): steps of order 3 that are even in ln σ, the last ones of less.

    Args:
        sigma_min, sigma_max: where the run ends and begins. With eta=0 it may go up.
        n: network calls.
        eta: 0 ≤ η ≤ 1, the share of noise. s_noise: a factor of it.
    """
    low, high = _ends(sigma_min, sigma_max, eta)
    check_int("n", n, 1, 1 << 20)
    whole, rest = divmod(n, 3)
    orders = [3] * (whole - 1) + [2, 1] if rest == 0 else [3] * whole + [rest]
    stops = [high * (low / high) ** (i / len(orders)) for i in range(len(orders))] + [low]
    rows = list[Row]()
    for order, (here, there) in zip(orders, pairwise(stops), strict=True):
        down, up = _down_and_up(here, there, low, eta)
        *inner, last = _rows(here, down, order)
        rows += [*inner, replace(last, x=blend((1.0, last.x), (s_noise * up, {"z": 1.0})))]
    sigmas = torch.tensor(stops, dtype=torch.float32, device=x.device)

    def info(i: int) -> dict[str, Any]:
        t = -sigmas[i].log()
        return {"t": t, "t_up": t}

    return run(
        Plan(tuple(rows), name="dpm_fast", init_sigma=high), model=model, x=x, sigmas=sigmas, extra_args=extra_args,
        callback=callback, disable=disable, options=options, noise_sampler=noise_sampler, info=info,
    )  # fmt: skip


def sample_dpm_adaptive(
    model: Model, x: Tensor, sigma_min: float, sigma_max: float, extra_args: Arguments = None,
    callback: Callback = None, disable: bool | None = None, order: int = 3, rtol: float = 0.05, atol: float = 0.0078,
    h_init: float = 0.05, pcoeff: float = 0.0, icoeff: float = 1.0, dcoeff: float = 0.0, accept_safety: float = 0.81,
    eta: float = 0.0, s_noise: float = 1.0, noise_sampler: Noise = None, return_info: bool = False, **options: Any,
) -> Tensor | tuple[Tensor, dict[str, int]]:  # fmt: skip
    """DPM-Solver-12 or -23 (Lu et al. 2022a, Appendix C): a step's size follows from how far its two orders are apart.

    A step is taken where a PID controller of that error finds it small, and tried again, shorter, where it does not;
    the error is read on the host after each try.

    Args:
        sigma_min, sigma_max: where the run ends and begins. With eta=0 it may go up.
        order: 2 or 3, and so many network calls a try.
        rtol, atol: the error that is allowed, of |x| and absolutely. h_init: the first step in ln σ.
        pcoeff, icoeff, dcoeff: the controller's. accept_safety: the least factor of a step's size at which it is taken.
        eta: 0 ≤ η ≤ 1, the share of noise. s_noise: a factor of it.
        return_info: return (x, {"steps", "nfe", "n_accept", "n_reject"}).
    """
    low, high = _ends(sigma_min, sigma_max, eta)
    check_int("order", order, 2, 3)
    for name, value in (("rtol", rtol), ("atol", atol), ("accept_safety", accept_safety)):
        check_number(name, value, 0)
    check_positive("h_init", h_init)
    denoise, noise = denoiser(model), _noise(x, options, noise_sampler)
    rest = {name: value for name, value in options.items() if name not in SOURCES}
    run_from(x, x.shape, rest)  # checks x and the options
    end, sign = -math.log(low), 1 if low < high else -1
    controller = _Controller(sign * h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    t, state, before = -math.log(high), x.to(torch.float32), x.to(torch.float32)
    counts = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    while sign * (end - t) > 1e-5:
        following = min(t + controller.h, end) if sign > 0 else max(t + controller.h, end)
        here, there = math.exp(-t), low if following == end else math.exp(-following)
        down, up = _down_and_up(here, there, low, eta)
        plan = shown(Plan(tuple(_two_orders(here, down, order)), name="dpm_adaptive", init_sigma=here))
        run_options = run_from(state, x.shape, {"seed": 0, **rest})  # these rows draw no noise
        run_options["model_dtype"] = x.dtype
        states = list(sample_iter(denoise, x.shape, sampler=plan, model_kwargs=extra_args, **run_options))
        taken, lower = states[-1].x, states[-1].slots[LOW]
        assert lower is not None
        allowed = torch.clamp(rtol * torch.maximum(lower.abs(), before.abs()), min=atol)
        error = float(torch.linalg.vector_norm((lower - taken) / allowed)) / math.sqrt(max(1, x.numel()))
        accepted = controller.accepts(error)
        if accepted:
            before, state, t = lower, taken, following
            if up:
                state = state + s_noise * up * noise(counts["n_accept"], here, there).to(torch.float32)
        counts["n_accept"] += accepted
        counts["n_reject"] += not accepted
        counts["nfe"] += order
        counts["steps"] += 1
        if callback is not None:
            reached = torch.tensor(t, dtype=torch.float32, device=x.device)
            sigma = reached.neg().exp()
            callback({
                "sigma": sigma, "sigma_hat": sigma, "x": state.clone(), "i": counts["steps"] - 1, "t": reached,
                "t_up": reached, "denoised": states[1].x0, "error": error, "h": controller.h, **counts,
            })  # fmt: skip
    return (state.to(x.dtype), counts) if return_info else state.to(x.dtype)


class _Controller:
    """k-diffusion's: the step's size by a product of powers of the last inverse errors (Hairer et al. 1993, II.4)."""

    def __init__(self, h: float, p: float, i: float, d: float, order: float, safety: float) -> None:
        self.h, self.safety = h, safety
        self.powers = ((p + i + d) / order, -(p + 2 * d) / order, d / order)
        self.inverse: list[float] = []  # of this try's error, and of the last two that were accepted

    def accepts(self, error: float) -> bool:
        """Whether a step of this error is taken; ``h`` becomes the size of the next try."""
        now = 1 / (error + 1e-8)
        self.inverse = [now, *(self.inverse[1:] or [now, now])]
        factor = math.prod(value**power for value, power in zip(self.inverse, self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        self.h *= factor
        if factor >= self.safety:
            self.inverse = [now, now, self.inverse[1]]
        return factor >= self.safety


def _ends(sigma_min: float, sigma_max: float, eta: float) -> tuple[float, float]:
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        check_positive(name, float(value))
    check_number("eta", eta, 0, 1)
    if sigma_min == sigma_max:
        raise ValueError(f"sigma_min and sigma_max must differ; got {float(sigma_min)}")
    if eta and sigma_min > sigma_max:
        raise ValueError(f"eta must be 0 in a run from {float(sigma_max)} up to {float(sigma_min)}; got {eta}")
    return float(sigma_min), float(sigma_max)


def _down_and_up(here: float, there: float, end: float, eta: float) -> tuple[float, float]:
    """(σ_down, σ_up): where a step leads, not beyond the run's end, and the noise added there."""
    if not eta:
        return there, 0.0
    down = max(there * math.exp(-grown_by(math.log(here / there), eta)), end)
    return down, math.sqrt(max(there**2 - down**2, 0.0))


def _rows(here: float, there: float, order: int) -> list[Row]:
    """A step of DPM-Solver-1, -2 or -3."""
    stops, shares = inserted(SCHEDULE, SCHEDULE.at(here), SCHEDULE.at(there), INNER[order], False)
    types = ["heun" if order == 3 else "midpoint", "midpoint"]
    return step_rows(stops, shares, "sample", math.inf, True, types, 0.0, 0.0)


def _two_orders(here: float, there: float, order: int) -> list[Row]:
    """A step of DPM-Solver-2 or -3 whose second row also writes where one of the order below leads to."""
    rows = _rows(here, there, order)
    step = noise_step(SCHEDULE.at(here), SCHEDULE.at(there), order - 2, "midpoint")
    weights = step.outputs([1 / 3] if order == 3 else [])
    output = [{"x": 1 / row.sigma, "x0": -1 / row.sigma} for row in rows]  # ε
    parts = [(step.keep, {"anchor": 1.0}), (weights[0], {"slot0": 1.0}), *((w, output[1]) for w in weights[1:])]
    rows[0] = replace(rows[0], slot=output[0], write=0)
    rows[1] = replace(rows[1], slot=blend(*parts), write=LOW, reads=(0,))
    return rows


def _noise(x: Tensor, options: dict[str, Any], noise_sampler: Noise) -> Any:
    """noise(draw, σ, σ') of the accepted steps."""
    if noise_sampler is not None:
        if has_source(options):
            raise ValueError("noise_sampler goes without another source of noise")
        return lambda draw, here, there: noise_sampler(*(torch.tensor(s, device=x.device) for s in (here, there)))
    if not has_source(options):
        return lambda draw, here, there: torch.randn_like(x)
    given = (options.get(name) for name in SOURCES)
    source = resolve_noise_source(tuple(x.shape), check_device(x.device), torch.float32, *given)
    backend = choose(options.get("backend", "auto"), x.device.type)
    return lambda draw, here, there: source.noise(1, draw, backend)
