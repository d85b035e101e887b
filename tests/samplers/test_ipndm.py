"""iPNDM against its loop in k-diffusion's states, and against PNDM and LMS where they are the same rule."""

import itertools

import numpy as np
import pytest
import torch
from helpers import spaced
from samplers_multistep import walk

from fastdiff import NoiseSchedule, samplers
from fastdiff.samplers.exponential import weights
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule

SCALED = NoiseSchedule.scaled_linear()
RULES = ([1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


def test_the_weights_are_those_of_equal_steps():
    """The integral over one step of the polynomial through the last outputs, one step apart."""
    for order, rule in enumerate(RULES, start=1):
        nodes = [-float(k) for k in range(1, order)]
        assert weights(nodes, [1 / (k + 1) for k in range(order)]) == pytest.approx(rule)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(SCALED, "epsilon"), (EDMSchedule(), "sample"), (FlowSchedule(), "flow_prediction"), (SCALED, "v_prediction")],
)
def test_the_loop(seed, schedule, prediction, order):
    """d = (x − x̂_0)/σ of x/α over σ/α, the last four d weighed; from the flow's σ = 1 by a step of DDIM."""
    stops = spaced(schedule, 7)
    start = torch.randn(2, 5, dtype=torch.float64)

    def network(x, row, i):
        return torch.sin(1.7 * x + i)

    plan = samplers.ipndm(schedule, 7, prediction=prediction, order=order)
    *_, got = walk(plan, start, network)
    x, past = start, []
    for i, (here, there) in enumerate(itertools.pairwise(stops)):
        m = torch.sin(1.7 * x * here.c_in + i)
        epsilon = {"epsilon": m, "sample": (x - here.alpha * m) / here.sigma, "flow_prediction": x + here.alpha * m,
                   "v_prediction": here.sigma * x + here.alpha * m}[prediction]  # fmt: skip
        if here.alpha == 0:
            x0 = x - m
            x = there.alpha * x0 + there.sigma * x
            continue
        past = [epsilon, *past][:order]
        mean = sum(w * e for w, e in zip(RULES[len(past) - 1], past, strict=True))
        x = there.alpha * (x / here.alpha + (there.ratio - here.ratio) * mean)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def test_even_steps_are_lms(seed):
    """Where σ/α falls evenly the weights of LMS's own steps are these, from the first row on."""
    sigmas = np.linspace(10, 0, 9).tolist()
    from fastdiff.schedules.spacing import Spacing

    ours = samplers.ipndm(EDMSchedule(), spacing=Spacing(sigmas=sigmas), prediction="sample")
    others = samplers.lms(EDMSchedule(), spacing=Spacing(sigmas=sigmas), prediction="sample")
    for a, b in zip(ours, others, strict=True):
        assert a.x == pytest.approx(b.x)


def test_refuses():
    for order, error in ((0, ValueError), (5, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="order"):
            samplers.ipndm(SCALED, 5, order=order)
