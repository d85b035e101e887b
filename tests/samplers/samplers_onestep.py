"""What the tests of one- and two-stage samplers share: textbook loops in float64, and walks with given outputs."""

import itertools
import math

import torch
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule
from fastdiff.plan.plan import Plan
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule

LINEAR = NoiseSchedule.linear()
EDM = EDMSchedule()
FLOW = FlowSchedule(2.0)
SHAPE = (2, 3, 4, 4)
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
