"""LCM against the float64 formula of its paper, its boundary condition and the timesteps of distilled networks."""

import itertools
import math

import pytest
import torch
from distilled import LINEAR, bar_at, tensors, vp_pair

import fastdiff
from fastdiff import Spacing, samplers


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_lcm(seed, prediction):
    for clip, steps in itertools.product((None, 1.0), (1, 4, 8)):
        plan = samplers.lcm(LINEAR, steps, prediction=prediction, clip=clip)
        ts = [int(row.t) for row in plan]
        assert ts == {1: [999], 4: [999, 759, 499, 259], 8: [999, 879, 759, 639, 499, 379, 259, 139]}[steps]
        x, m, z = tensors(3)
        for i, t in enumerate(ts):
            x0, _ = vp_pair(prediction, x, m, bar_at(t))
            if clip:
                x0 = x0.clamp(-clip, clip)
            f = x * 0.25 / ((10 * t) ** 2 + 0.25) + x0 * (10 * t) / math.sqrt((10 * t) ** 2 + 0.25)
            after = bar_at(ts[i + 1]) if i + 1 < steps else 1.0
            exact = math.sqrt(after) * f + math.sqrt(1 - after) * z
            got = fastdiff.ops.update(x, m, plan, i, noise=z).x
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))
        assert [row.uses("z") for row in plan] == [True] * (steps - 1) + [False]


def test_lcm_keeps_a_clean_image():
    """The boundary condition: f(x, 0) = x."""
    plan = samplers.lcm(LINEAR, spacing=Spacing(timesteps=[0]), timestep_scaling=3.0, sigma_data=0.7)
    assert plan[0].x == {"x0": 0, "x": 1, "z": 0}
    plan = samplers.lcm(LINEAR, spacing=Spacing(timesteps=[7]), timestep_scaling=3.0, sigma_data=0.7)
    assert plan[0].x["x"] == pytest.approx(0.49 / (441 + 0.49))
    assert plan[0].x["x0"] == pytest.approx(21 / math.sqrt(441.49))


def test_distilled_timesteps():
    """k − 1, 2k − 1, … from the top, at every original/steps-th place; lists and spacings take their place."""
    assert samplers.tcd(LINEAR, 3, original_inference_steps=10).timesteps == (999, 699, 399)
    assert samplers.lcm(LINEAR, None, original_inference_steps=5).timesteps == (999, 799, 599, 399, 199)
    assert samplers.lcm(LINEAR, 4, spacing="trailing").timesteps == (999, 749, 499, 249)
    assert samplers.lcm(LINEAR, spacing=Spacing(timesteps=[900, 3])).timesteps == (900, 3)
    assert samplers.tcd(LINEAR, spacing=Spacing(sigmas=[5.0, 1.0, 0.0]))[0].sigma == pytest.approx(5 / math.sqrt(26))
