"""What the tests of inpainting and of RePaint share: the step and the replacement in float64."""

import math

import torch

import fastdiff
from fastdiff.plan.plan import Plan

SHAPE = (3, 2, 5, 7)
LINEAR = fastdiff.NoiseSchedule.linear()


def model(x, t):
    return torch.tanh(x) * (0.9 + t.to(x.dtype).view(-1, 1, 1, 1) / 5000)


def hole() -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, known): known on the left, half known in a column, a hole on the right."""
    mask = torch.ones(5, 7)
    mask[:, 4:] = 0
    mask[:, 3] = 0.5
    return mask, torch.rand(SHAPE) * 2 - 1


def bars_of(plan: Plan) -> list[float]:
    return [float(LINEAR.alphas_cumprod[int(t)]) for t in plan.timesteps] + [1.0]


def normal(seed, stream, draw):
    return fastdiff.randn(SHAPE, seed=seed, stream=stream, draw=draw).double()


def ddpm_step(x, m, bar, bar_p, z):
    x0 = ((x - math.sqrt(1 - bar) * m) / math.sqrt(bar)).clamp(-1, 1)
    beta = 1 - bar / bar_p
    mean = math.sqrt(bar_p) * beta / (1 - bar) * x0 + math.sqrt(1 - beta) * (1 - bar_p) / (1 - bar) * x
    return mean + math.sqrt((1 - bar_p) / (1 - bar) * beta) * z


def replaced(x, mask, known, bar, z):
    return mask * (math.sqrt(bar) * known + math.sqrt(1 - bar) * z) + (1 - mask) * x
