"""How fast every sampler converges, measured where the answer is known (``mixture.py``).

``samplers_page.py`` renders the measurements as docs/samplers.md; tests/samplers/test_convergence.py asserts them.

Deterministic samplers: the error against steps. *Exact*: ln σ falls evenly from σ/α = 8 to 0.1, outputs before the
first step are exact, no step is of lower order than the method. *As shipped*: the sampler's defaults over EDM's levels
to σ = 0. The order is the slope in a double-logarithmic plot, fitted where the error lies in [1e-11, 1e-2].

Stochastic samplers: the same of the variance that they give data N(0, 0.8²). There every row is linear, so the image is
a known combination of x_T and of every noise, and its variance is the sum of the squares: no sampling error. Beside it
stand the moments of 100,000 samples of the mixture, and their two-sample Kolmogorov–Smirnov distance from its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from mixture import (
    DEVIATION,
    DEVIATIONS,
    MEANS,
    WEIGHTS,
    Array,
    Network,
    consistency_network,
    draw,
    exact_network,
    predict,
    predict_gaussian,
    quantiles,
    run,
)

import fastdiff
from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule, Plan, Row
from fastdiff.samplers import SAMPLERS
from fastdiff.samplers.lcm import distilled_timesteps
from fastdiff.schedules.level import Level, Schedule
from fastdiff.schedules.spacing import Spacing

STEPS = (10, 20, 40, 80, 160, 320, 640)
FITTED = (1e-11, 1e-2)
LOW = 0.1  # σ/α where the exact walk ends
LEAD = 6  # its levels above the first, whose states are given
POINTS = (np.arange(12) + 0.5) / 12  # the quantiles that are followed

VP, EDM, FLOW = NoiseSchedule.linear(), EDMSchedule(), FlowSchedule()
PROCESSES: dict[str, tuple[Schedule, str]] = {
    "VP": (VP, "epsilon"),
    "VE": (EDM, "edm"),
    "flow": (FLOW, "flow_prediction"),
}


@dataclass(frozen=True)
class Case:
    """A deterministic sampler, what it is called with, its order in theory, and what keeps its exact walk exact."""

    sampler: str
    order: int
    options: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    even: bool = False  # steps even in σ/α instead of its logarithm
    high: float = 8.0  # σ/α where the exact walk starts

    @property
    def title(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"`{self.sampler}`" + (f" {options}" if options else "") + (", even σ/α" if self.even else "")

    @property
    def shipped(self) -> bool:
        """Whether the options are the sampler's defaults, on a walk that falls."""
        defaults = inspect.signature(SAMPLERS[self.sampler]).parameters
        same = all(name in defaults and defaults[name].default == value for name, value in self.options.items())
        return same and not self.even and self.sampler != "ddim_inverse"


@dataclass(frozen=True)
class NoisyCase:
    """A stochastic sampler, its weak order in theory, and the steps that it is sampled in."""

    sampler: str
    order: int
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)

    even: bool = False

    title = Case.title

    @property
    def high(self) -> float:
        """σ/α where the walk starts: low enough that the larger errors of order 1 are small in 640 steps."""
        return 1.0 if self.order == 1 else 2.0


WHOLE = {"lower_order_final": False}
# UniPC's corrected states need an exact start like its outputs: the steps of the lead are left uncorrected.
UNCORRECTED = {**WHOLE, "disable_corrector": range(LEAD)}

CASES = (
    Case("ddim", 1),
    Case("ddim_inverse", 1, high=2.0),
    Case("euler", 1),
    Case("heun", 2),
    Case("dpm2", 2),
    *(Case("lms", order, {"order": order}) for order in (1, 2, 3, 4)),
    Case("pndm", 2),  # equal weights for steps that are not (Liu et al. 2022)
    Case("pndm", 4, even=True, high=2.0),
    Case("ipndm", 2),
    Case("ipndm", 4, even=True, high=2.0),
    Case("dpmpp_1s", 1),
    Case("dpmpp_2s", 2, whole=WHOLE),
    Case("dpmpp_2m", 2, whole=WHOLE),
    Case("dpmpp_2m", 2, {"solver_type": "heun"}, WHOLE),
    Case("dpmpp_3m", 2, whole=WHOLE),  # as published, with half of its quadratic's integral
    Case("dpmpp_3m", 3, {"solver_type": "exact"}, WHOLE),
    Case("dpm_solver_2", 2, whole=WHOLE),
    Case("dpm_solver_2", 2, {"method": "multistep"}, WHOLE),
    Case("dpm_solver_3", 3, whole=WHOLE),
    Case("dpm_solver_3", 2, {"method": "multistep"}, WHOLE),
    Case("dpm_solver_3", 3, {"method": "multistep", "solver_type": "exact"}, WHOLE),
    Case("dpm_multistep", 2, whole=WHOLE),
    Case("dpm_singlestep", 2, whole=WHOLE),
    Case("dpm_singlestep", 3, {"order": 3, "stages": "inserted", "solver_type": "exact"}, WHOLE),
    *(Case("deis", order, {"order": order}, WHOLE) for order in (1, 2, 3)),
    *(Case("unipc", order + 1, {"order": order, "solver_type": kind}, UNCORRECTED)
      for kind in ("bh1", "bh2") for order in (1, 2, 3)),
    *(Case("unipc", order, {"order": order, "disable_corrector": range(700)}, WHOLE) for order in (2, 3)),
    Case("sa_solver", 2, {"tau": 0.0, "predictor_order": 1}, WHOLE),
    Case("sa_solver", 3, {"tau": 0.0, "corrector_order": 3}, WHOLE),
    Case("sa_solver", 3, {"tau": 0.0, "predictor_order": 3, "corrector_order": 0}, WHOLE),
)  # fmt: skip

NOISY = (
    NoisyCase("ddpm", 1, 500),
    NoisyCase("ddim", 1, 500, {"eta": 1.0}),
    NoisyCase("euler_ancestral", 1, 500),
    NoisyCase("dpm2_ancestral", 2, 80),
    NoisyCase("dpmpp_2s_ancestral", 2, 80),
    NoisyCase("dpmpp_sde", 1, 600),
    NoisyCase("dpmpp_2m_sde", 2, 80, whole=WHOLE),
    NoisyCase("dpmpp_3m_sde", 2, 80, whole=WHOLE),
    NoisyCase("sa_solver", 2, 80, {"corrector_order": 0}, WHOLE),
    NoisyCase("flow_sde", 1, 500),
    NoisyCase("restart", 2, 80, {"intervals": ((0.3, 0.8, None, 1),)}),
    NoisyCase("repaint", 1, 500, {"jump_n_sample": 2}),
    NoisyCase("euler", 1, 500, {"s_churn": 4.0}),
    NoisyCase("heun", 2, 80, {"s_churn": 4.0}),
    NoisyCase("dpm2", 2, 80, {"s_churn": 4.0}),
)

# ---- deterministic samplers


def exact_walk(
    case: Case | NoisyCase, process: str, steps: int, lead: int = LEAD, high: float | None = None
) -> tuple[Plan, Level]:
    """The plan to LOW with ``lead`` levels above, and the level where it ends."""
    schedule, prediction = prediction_of(case, process)
    share = np.arange(-lead, steps + 1) / steps
    high = case.high if high is None else high
    ratios = high + (LOW - high) * share if case.even else high * (LOW / high) ** share
    ratios[-1] = LOW
    sigmas = [float(r / (1 + r) if process == "flow" else r) for r in ratios]
    options = {**case.options, **case.whole}
    plan = SAMPLERS[case.sampler](schedule, spacing=Spacing(sigmas=sigmas), prediction=prediction, **options)
    states = schedule.as_ve() if plan[0].alpha == 1 else schedule
    end = states.at(sigmas[0 if case.sampler == "ddim_inverse" else -1])
    return plan, end


def exact_error(case: Case, process: str, steps: int) -> float:
    """Root mean square over POINTS, of states scaled to α² + σ² = 1."""
    upwards = case.sampler == "ddim_inverse"
    plan, end = exact_walk(case, process, steps, 0 if upwards else LEAD)

    def exact(row: Row) -> Array | None:
        given = row is plan[0] if upwards else row.sigma >= row.alpha * case.high * (1 - 1e-9)
        return quantiles(POINTS, row.alpha, row.sigma) if given else None

    x = run(plan, exact_network(*prediction_of(case, process)), POINTS, exact=exact)
    error = x - quantiles(POINTS, end.alpha, end.sigma)
    return float(np.sqrt(np.mean(error**2)) / math.hypot(end.alpha, end.sigma))


def prediction_of(case: Case | NoisyCase, process: str) -> tuple[Schedule, str]:
    """The process's schedule and what its network predicts; DDIM's inversion has no form for "edm"."""
    schedule, prediction = PROCESSES[process]
    return schedule, "epsilon" if case.sampler == "ddim_inverse" and prediction == "edm" else prediction


def shipped_error(case: Case, steps: int) -> float:
    """Of x_0, by the sampler's defaults on EDM's levels."""
    plan = SAMPLERS[case.sampler](EDM, steps, prediction="edm", spacing="karras", **case.options)
    x = run(plan, exact_network(EDM, "edm"), quantiles(POINTS, plan[0].alpha, plan[0].sigma))
    return float(np.sqrt(np.mean((x - quantiles(POINTS, 1.0, 0.0)) ** 2)))


def last_jump() -> float:
    """What is left of an error as shipped in many steps: x̂_0 at EDM's σ_min is not yet the flow's x_0."""
    x0, _ = predict(quantiles(POINTS, 1.0, EDM.sigma_min), 1.0, EDM.sigma_min)
    return float(np.sqrt(np.mean((x0 - quantiles(POINTS, 1.0, 0.0)) ** 2)))


def slope(steps: Sequence[int], errors: Iterable[float]) -> float:
    """The order: minus the slope of ln error against ln steps, where the error lies in FITTED."""
    pairs = [(n, e) for n, e in zip(steps, errors, strict=True) if FITTED[0] <= e <= FITTED[1]]
    if len(pairs) < 2:
        raise ValueError(f"fewer than two errors lie in {FITTED}: {list(errors)}")
    return float(-np.polyfit(*np.log(np.array(pairs)).T, 1)[0])


# ---- stochastic samplers


def variance_error(case: NoisyCase, process: str, steps: int) -> float:
    """Of the variance over the true one. A state is the vector of its coefficients of x_T and of each row's noise."""
    plan, end = exact_walk(case, process, steps, 0)
    schedule, prediction = PROCESSES[process]

    def unit(i: int) -> Array:
        return np.eye(1, len(plan) + 1, i)[0]

    start = unit(0) * math.hypot(plan[0].alpha * DEVIATION, plan[0].sigma)
    network = exact_network(schedule, prediction, predict_gaussian)
    x = run(plan, network, start, noise=lambda row: unit(row + 1))
    return float(abs(x @ x / ((end.alpha * DEVIATION) ** 2 + end.sigma**2) - 1))


@dataclass(frozen=True)
class Sampled:
    """How samples compare with the mixture: the first four moments, in standard errors, and the two-sample test."""

    moments: tuple[float, ...]
    distance: float
    p: float


def sampled(case: NoisyCase, count: int = 100_000) -> Sampled:
    """Samples from σ/α = 4 down, the states there being the mixture's own."""
    plan, end = exact_walk(case, "VP", case.steps, 0, high=4.0)
    return compared(plan, exact_network(*PROCESSES["VP"]), count, end.alpha, end.sigma)


def distilled(name: str, steps: int, count: int = 100_000) -> Sampled:
    """LCM and TCD, with the network that distillation aims at: it lands where the flow does."""
    plan = SAMPLERS[name](VP, steps)
    times = [*distilled_timesteps(len(VP), steps, 50), 0]
    eta = inspect.signature(SAMPLERS["tcd"]).parameters["eta"].default
    landing = {here: math.floor((1 - eta) * there + 1e-6) for here, there in pairwise(times)}
    network = consistency_network(VP, lambda t: landing[int(t)] if name == "tcd" else None)
    end = VP.level(0) if name == "tcd" else VP.at(0.0)
    return compared(plan, network, count, end.alpha, end.sigma)


def compared(plan: Plan, network: Network, count: int, alpha: float, sigma: float) -> Sampled:
    """The plan's samples beside states of the level where it ends; its noise is fastdiff's."""
    from scipy.stats import ks_2samp

    def noise(row: int) -> Array:
        return fastdiff.randn((1, count), seed=0, draw=row, stream=plan[row].stream)[0].numpy().astype(np.float64)

    x = run(plan, network, draw(count, 1, plan[0].alpha, plan[0].sigma), noise=noise)
    test = ks_2samp(x, draw(count, 2, alpha, sigma))
    expected = [moment(k, alpha, sigma) for k in range(9)]
    errors = [
        (np.mean(x**k) - expected[k]) / math.sqrt((expected[2 * k] - expected[k] ** 2) / count) for k in range(1, 5)
    ]
    return Sampled(tuple(map(float, errors)), float(test.statistic), float(test.pvalue))


def moment(k: int, alpha: float, sigma: float) -> float:
    """E[x^k] at a level. A Gaussian's is the sum over even j of C(k, j) mean^(k − j) deviation^j (j − 1)!!."""
    mean, deviation = alpha * MEANS, np.sqrt((alpha * DEVIATIONS) ** 2 + sigma**2)
    parts = [math.comb(k, j) * mean ** (k - j) * deviation**j * math.prod(range(1, j, 2)) for j in range(0, k + 1, 2)]
    return float((WEIGHTS * sum(parts)).sum())
