"""Group relative policy optimisation (GRPO) of the packaged digits: they learn to be bright.

    python examples/grpo.py [--seeds 0 1] [--steps 8]

A step draws a group of images of each digit and takes each image's reward relative to its group's; then one update
makes the draws of the better ones likelier (Liu et al. 2025, Equation 5, without its KL term, for one inner step:
clipping would then change nothing). The reward that is printed is that of other noise, the same for every step.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor

import fastdiff
from fastdiff.models import UNet

CLASSES, GROUP, CLIP = 10, 8, 0.2
LABELS = torch.arange(CLASSES).repeat_interleave(GROUP)
SHAPE = (len(LABELS), 1, 8, 8)


def brightness(images: Tensor) -> Tensor:
    return images.clamp(-1, 1).mean(dim=(1, 2, 3))


def held_out(model: UNet, plan: fastdiff.Plan) -> float:
    images = fastdiff.sample(model, SHAPE, sampler=plan, seed=2**32, model_kwargs={"class_labels": LABELS})
    return float(brightness(images).mean())


def step(model: UNet, plan: fastdiff.Plan, optimizer: torch.optim.Optimizer, seed: int) -> None:
    told = {"model_kwargs": {"class_labels": LABELS}}
    states = list(fastdiff.sample_iter(model, SHAPE, sampler=plan, seed=seed, return_log_prob=True, **told))
    old = states[-1].log_prob
    assert old is not None
    rewards = brightness(states[-1].x).view(CLASSES, GROUP)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).flatten()
    for row in plan.noisy_rows:  # one row's activations in memory at a time
        new = fastdiff.log_prob(model, states[row], states[row + 1], plan, **told)
        ratio = ((new - old[row]) / states[row].x[0].numel()).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        (-gain.mean() / len(plan.noisy_rows)).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(seed: int, steps: int) -> list[float]:
    """The held-out reward before the first step and after each."""
    digits = fastdiff.models.digits()
    model = copy.deepcopy(digits.unet)
    plan = fastdiff.samplers.ddim(digits.sampling["schedule"], 6, eta=1.0, clip=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    rewards = [held_out(model, plan)]
    for number in range(steps):
        step(model, plan, optimizer, seed * steps + number)
        rewards.append(held_out(model, plan))
        print(f"seed {seed}, step {number + 1}: brightness {rewards[-2]:.4f} -> {rewards[-1]:.4f}", flush=True)
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        rewards = train(seed, arguments.steps)
        print(f"seed {seed}: brightness {rewards[0]:.4f} before, {rewards[-1]:.4f} after {arguments.steps} steps")


if __name__ == "__main__":
    main()
