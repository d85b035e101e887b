"""DDIM inversion: down after up is the identity, through sample, and clipped as DDIM clips."""

import itertools

import pytest
import torch
from helpers import assert_same_bits, planned
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule, samplers
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule

LINEAR = NoiseSchedule.linear()
FLOW = FlowSchedule(2.0)
SHAPE = (2, 3, 4, 4)


def tensors(count: int) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(
    "walk", [{}, {"spacing": "trailing"}, {"spacing": "karras"}, {"final": "sigma_min", "spacing": "linspace"}]
)
@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_inversion_and_reconstruction(seed, kind, walk):
    """Where the network's output depends on t alone, down after up is the identity; each row told the same t."""
    schedule = LINEAR if kind == "vp" else FLOW
    walk = {"spacing": "trailing"} | walk if kind == "flow" else walk
    predictions = ("epsilon", "v_prediction") if kind == "vp" else ("flow_prediction",)
    for prediction in predictions:
        up = planned(samplers.ddim_inverse, schedule, 12, prediction=prediction, **walk)
        down = planned(samplers.ddim, schedule, 12, prediction=prediction, **walk)
        assert up.timesteps == down.timesteps[::-1]
        assert not any(row.uses("z") for row in up)
        image = torch.randn(SHAPE, dtype=torch.float64)
        said = {row.t: torch.randn(SHAPE, dtype=torch.float64) for row in up}
        # ε of a v-network does not depend on t alone: take the v that says a fixed ε where the row stands.
        x = image
        for plan in (up, down):
            for i, row in enumerate(plan):
                m = said[row.t]
                if prediction == "v_prediction":
                    x0 = (x - row.sigma * m) / row.alpha
                    m = row.alpha * m - row.sigma * x0
                x = fastdiff.ops.update(x, m, plan, i).x
        torch.testing.assert_close(x, image, rtol=0, atol=1e-9)


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth ε: the exact one for images of variance 1/4, and a wave."""
    bar = LINEAR.alphas_cumprod.to(x.dtype)[t.long()].view(-1, *[1] * (x.ndim - 1))
    return x * (1 - bar).sqrt() / (1 - 0.75 * bar) + 0.05 * torch.sin(3 * x)


def test_inversion_by_sample(seed):
    """From an image by x_init, without noise, and back by x_T; the difference falls with the steps."""
    image = torch.randn(SHAPE) / 2
    errors = []
    for steps in (25, 250):
        up, down = samplers.ddim_inverse(LINEAR, steps), samplers.ddim(LINEAR, steps)
        latents = fastdiff.sample(network, SHAPE, sampler=up, x_init=image, seed=1)
        assert_same_bits(latents, fastdiff.sample(network, SHAPE, sampler=up, x_init=image, seed=2))
        named = fastdiff.sample(network, SHAPE, sampler="ddim_inverse", steps=steps, x_init=image)
        assert_same_bits(latents, named)
        assert_same_bits(latents, fastdiff.sample(network, SHAPE, sampler=up, x_T=image))
        exact = image.double()
        for row, after in itertools.pairwise([*up, None]):
            m = network(exact, torch.full((2,), row.t))
            end = after or samplers.ddim(LINEAR, steps)[0]
            x0 = (exact - row.sigma * m) / row.alpha
            exact = end.alpha * x0 + end.sigma * m
        torch.testing.assert_close(latents.double(), exact, rtol=1e-4, atol=1e-4)
        again = fastdiff.sample(network, SHAPE, sampler=down, x_T=latents)
        errors.append(float((again - image).abs().max()))
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.05


def test_inversion_clips_as_ddim_does(seed):
    up = samplers.ddim_inverse(LINEAR, 10, clip=0.5)
    x, m, _ = tensors(3)
    row, after = up[4], up[5]
    x0 = ((x - row.sigma * m) / row.alpha).clamp(-0.5, 0.5)
    torch.testing.assert_close(fastdiff.ops.update(x, m, up, 4).x, after.alpha * x0 + after.sigma * m)


def test_inversion_of_ve_states(seed):
    """EDM's: the network is told and shown what ddim's row between the same two levels tells and shows it."""
    schedule = EDMSchedule()
    for prediction, walk in (("epsilon", {}), ("sample", {"final": "sigma_min"})):
        up = planned(samplers.ddim_inverse, schedule, 6, prediction=prediction, spacing="karras", **walk)
        down = planned(samplers.ddim, schedule, 6, prediction=prediction, spacing="karras", **walk)
        for a, b in zip(up, reversed(down), strict=True):
            assert (a.t, a.c_in) == (b.t, b.c_in)
        for row, after in zip(up.rows[1:], reversed(down.rows[1:]), strict=True):
            assert (row.alpha, row.sigma) == (after.alpha, after.sigma)
        assert up[0].sigma == (0.002 if walk else 0)
        x, m, _ = tensors(3)
        epsilon = m if prediction == "epsilon" else (x - m) / up[3].sigma
        exact = x + (up[4].sigma - up[3].sigma) * epsilon
        torch.testing.assert_close(fastdiff.ops.update(x, m, up, 3).x, exact, rtol=1e-9, atol=1e-9)


def test_an_inversion_takes_no_mask():
    """Its last row would put the clean known image into noise."""
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="'ddim_inverse' leads to noise"):
        fastdiff.sample(
            lambda x, t: x, x.shape, sampler="ddim_inverse", steps=4, x_init=x, mask=torch.ones(4, 4) == 1, known=x
        )
