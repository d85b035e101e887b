"""A conditional network, and the guided step by two calls and the formula: shared by the tests of guidance."""

import torch

import fastdiff

SHAPE = (3, 2, 4, 4)
PLAN = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 6, eta=0.5, clip=1.0)


class Conditional:
    """x, t and a class embedding make an output, element by element; the calls are kept."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y, scale=1.0):
        self.calls.append((x.clone(), t.clone(), y.clone()))
        return x * (0.5 + y.view(-1, 1, 1, 1) * scale)


def conditions():
    return torch.tensor([1.0, 2.0, 3.0]) / 8, torch.zeros(3)


def manual(backend, seed, scale, rescale=0.0):
    """Two calls a row, and the formula of Lin et al. 2024, Equations 14-16, for the rescale."""
    y, null = conditions()
    x, model = fastdiff.randn(SHAPE, seed=seed), Conditional()
    for row in range(len(PLAN)):
        t = torch.full((3,), int(PLAN[row].t))
        u, c = model(x, t, null), model(x, t, y)
        gain = None
        if rescale:
            guided = (1 - scale) * u + scale * c
            factor = c.flatten(1).std(1) / guided.flatten(1).std(1)
            gain = rescale * factor + (1 - rescale)
        x = fastdiff.ops.update(
            x, (u, c), PLAN, row, guidance=(1 - scale, scale), seed=seed, gain=gain, backend=backend
        ).x
    return x
