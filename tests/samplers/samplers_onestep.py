"""What the tests of one- and two-stage samplers share: textbook loops in float64, and whole walks against them."""

import itertools
import math

import pytest
import torch
from helpers import planned
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule, samplers
from fastdiff.plan.plan import Plan
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule

LINEAR = NoiseSchedule.linear()
EDM = EDMSchedule()
FLOW = FlowSchedule(2.0)
SHAPE = (2, 3, 4, 4)
LISTS = {
    "ve": (LINEAR, [100.0, 20.0, 5.0, 1.2, 0.3, 0.02]),
    "edm": (EDM, [80.0, 17.0, 2.5, 0.17, 0.002]),
    "flow": (FLOW, [0.99, 0.8, 0.45, 0.1, 0.02]),
}
NAMES = ("euler", "heun", "dpm2", "euler_ancestral", "dpm2_ancestral")
CHURN = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.01}


# ---- the textbook loops. They know σ, the network's outputs in the order of its calls, and the noise in the order of
# its draws; the state is VE, or a flow's x = (1 − σ) x_0 + σ ε.


def denoised(prediction: str, kind: str, x: Tensor, m: Tensor, sigma: float, clip: float | None) -> Tensor:
    """x̂_0 by each type's own definition."""
    alpha = 1 - sigma if kind == "flow" else 1.0
    data = 0.5 if kind == "edm" else 1.0
    c_in = {"ve": 1 / math.sqrt(1 + sigma**2), "edm": 1 / math.sqrt(sigma**2 + 0.25), "flow": 1.0}[kind]
    if prediction == "epsilon":
        x0 = (x - sigma * m) / alpha
    elif prediction == "sample":
        x0 = m
    elif prediction == "v_prediction":
        norm = math.hypot(alpha, sigma)
        x0 = alpha / norm * (x / norm) - sigma / norm * m
    elif prediction == "flow_prediction":  # m = ε − x0 and x = α x0 + σ ε
        x0 = (x - sigma * m) / (alpha + sigma)
    elif prediction == "edm":
        y, s = x / alpha, sigma / alpha
        x0 = data**2 / (s**2 + data**2) * y + s * data / math.sqrt(s**2 + data**2) * m
    else:  # Tweedie's formula, with d/dx = c_in d/d(c_in x)
        x0 = (x + sigma**2 * (c_in * m)) / alpha
    return x0 if clip is None else x0.clamp(-clip, clip)


def churned(kind: str, x: Tensor, sigma: float, steps: int, z, options: dict) -> tuple[Tensor, float]:
    """Karras et al. 2022, Algorithm 2, lines 4 to 6, a flow's state being taken to y = x/(1 − σ) and back."""
    ratio = sigma if kind != "flow" else (math.inf if sigma == 1 else sigma / (1 - sigma))
    if not options or ratio == math.inf or not options["s_tmin"] <= ratio <= options["s_tmax"]:
        return x, sigma
    gamma = min(options["s_churn"] / steps, math.sqrt(2) - 1)
    hat = ratio * (1 + gamma)
    noise = math.sqrt(hat**2 - ratio**2) * options["s_noise"] * next(z)
    if kind != "flow":
        return x + noise, hat
    return (x / (1 - sigma) + noise) / (1 + hat), hat / (1 + hat)


def textbook(name, kind, sigmas, x, outputs, noises, prediction, clip, eta=1.0, churn=None):
    outputs, z, steps = iter(outputs), iter(noises), len(sigmas) - 1

    def slope(x, sigma):
        return (x - denoised(prediction, kind, x, next(outputs), sigma, clip)) / sigma

    for sigma, after in itertools.pairwise(sigmas):
        if "ancestral" in name:
            if kind == "flow":  # variances: σ_up² of the posterior of a VE state, times (1 − σ')²
                r, r2 = sigma / (1 - sigma) if sigma < 1 else math.inf, after / (1 - after)
                up = (1 - after) * eta * (r2 if r == math.inf else math.sqrt(r2**2 * (r**2 - r2**2) / r**2))
            else:
                up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
            down = math.sqrt(max(after**2 - up**2, 0))
            if name == "euler_ancestral" and kind == "flow":
                x0 = denoised(prediction, kind, x, next(outputs), sigma, clip)
                x = (1 - after) * x0 + down * (x - (1 - sigma) * x0) / sigma
            elif name == "euler_ancestral" or down == 0:
                x = x + (down - sigma) * slope(x, sigma)
            else:
                middle = math.exp((math.log(sigma) + math.log(down)) / 2)
                x = x + (down - sigma) * slope(x + (middle - sigma) * slope(x, sigma), middle)
            if after > 0 and eta > 0:
                x = x + up * next(z)
            continue
        x, sigma = churned(kind, x, sigma, steps, z, churn)
        d = slope(x, sigma)
        if name == "euler" or after == 0:
            x = x + (after - sigma) * d
        elif name == "heun":
            x = x + (after - sigma) * (d + slope(x + (after - sigma) * d, after)) / 2
        else:
            middle = math.exp((math.log(sigma) + math.log(after)) / 2)
            x = x + (after - sigma) * slope(x + (middle - sigma) * d, middle)
    return x


def run(plan: Plan, x: Tensor, outputs, noises) -> Tensor:
    outputs, noises, anchor = iter(outputs), iter(noises), None
    for i, row in enumerate(plan):
        m = next(outputs) if row.calls_model else ()
        out = fastdiff.ops.update(x, m, plan, i, noise=next(noises) if row.uses("z") else None, anchor=anchor)
        x, anchor = out.x, out.anchor if out.anchor is not None else anchor
    assert next(outputs, None) is None
    return x


def tensors(count: int, scale: float = 1.0) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=torch.float64) * scale for _ in range(count)]


# ---- what each sampler's page asks of it


def cases(*names: str) -> list[tuple[str, str]]:
    """Every kind of state for each sampler; dpm2_ancestral refuses flows."""
    return [case for case in itertools.product(names, LISTS) if case != ("dpm2_ancestral", "flow")]


def check_walks(name: str, kind: str, prediction: str) -> None:
    """Every sampler, state and prediction type, to σ = 0 and to σ > 0, clipped or not, with and without churn or η."""
    schedule, listed = LISTS[kind]
    ancestral = "ancestral" in name
    for end, clip, extra in itertools.product(([], [0.0]), (None, 1.0), (0, 1)):
        sigmas = listed + end
        options = {"eta": (0.6, 1.0)[extra]} if ancestral else CHURN if extra else {}
        plan = planned(getattr(samplers, name), schedule, prediction=prediction, clip=clip, sigmas=sigmas, **options)
        x = torch.randn(SHAPE, dtype=torch.float64) * sigmas[0]
        calls = sum(row.calls_model for row in plan)
        assert calls == (len(sigmas) - 1 if "euler" in name else 2 * (len(sigmas) - 1) - len(end))
        m, z = tensors(calls), tensors(len(plan))
        m = [o.float() for o in m]
        arguments = {"eta": options["eta"]} if ancestral else {"churn": options}
        exact = textbook(name, kind, sigmas, x, [o.double() for o in m], z, prediction, clip, **arguments)
        got = run(plan, x, m, z)
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max() + 1))


def check_flows_start_without_signal(name: str, prediction: str) -> None:
    """σ = 1: no ε, and no churn; the rest as ever."""
    sigmas = [1.0, 0.7, 0.2, 0.0]
    options = {"s_noise": 1.0} if "ancestral" in name else CHURN | {"s_tmax": math.inf}
    plan = planned(getattr(samplers, name), FLOW, prediction=prediction, sigmas=sigmas, **options)
    assert plan[0].calls_model
    assert plan.init_sigma == 1
    x, m, z = torch.randn(SHAPE, dtype=torch.float64), tensors(5), tensors(8)
    m = [o.float() for o in m[: sum(row.calls_model for row in plan)]]
    exact = textbook(name, "flow", sigmas, x, [o.double() for o in m], z, prediction, None,
                     churn=None if "ancestral" in name else options)  # fmt: skip
    torch.testing.assert_close(run(plan, x, m, z), exact, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="epsilon"):
        planned(getattr(samplers, name), FLOW, 4)


def check_rows_say_where_they_start(name: str, kind: str) -> None:
    """Given the true image, a row at (α, σ) sees α x_0 + σ ε; its t and c_in belong to that σ."""
    schedule, listed = LISTS[kind]
    options = {"eta": 0.7} if "ancestral" in name else CHURN
    plan = planned(getattr(samplers, name), schedule, prediction="sample", sigmas=[*listed, 0.0], **options)
    x0 = torch.full((1, 1), 0.5, dtype=torch.float64)
    # The noise of a state, as its coefficients of the independent draws; the first is x_T's.
    x = plan[0].alpha * x0 + plan.init_sigma * torch.eye(1, len(plan) + 1, dtype=torch.float64)
    assert plan.init_sigma == listed[0] == plan[0].sigma
    anchor = None
    for i, row in enumerate(plan):
        noise = x - row.alpha * x0
        assert float(noise.norm()) == pytest.approx(row.sigma, rel=1e-9), i
        ratio = row.sigma / row.alpha
        t = {"ve": lambda r: LINEAR.time_at(r), "edm": lambda r: math.log(r) / 4, "flow": lambda r: 1000 * r / (1 + r)}
        assert row.t == pytest.approx(t[kind](ratio))
        c_in = {"ve": 1 / math.sqrt(1 + ratio**2), "edm": 1 / math.sqrt(ratio**2 + 0.25), "flow": 1}[kind]
        assert row.c_in == pytest.approx(c_in)
        assert (row.p, row.q) == ((0, 1) if row.calls_model else (0, 0))
        z = torch.eye(1, len(plan) + 1, dtype=torch.float64).roll(i + 1, dims=1)
        if row.uses("z") and not row.calls_model:
            z = z / 1.01  # s_noise would raise the noise above its level
        m = x0.expand_as(x).contiguous() if row.calls_model else ()
        out = fastdiff.ops.update(x.contiguous(), m, plan, i, noise=z if row.uses("z") else None, anchor=anchor)
        x, anchor = out.x, out.anchor if out.anchor is not None else anchor
    torch.testing.assert_close(x, x0.expand_as(x), rtol=0, atol=1e-9)
