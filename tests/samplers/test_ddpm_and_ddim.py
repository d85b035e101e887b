"""DDPM and DDIM: listed timesteps, an end without signal, diffusers' stored numbers, and what they refuse."""

import itertools
import math

import pytest
import torch
from helpers import dummy, dummy_sample, planned

import fastdiff
from fastdiff import NoiseSchedule, samplers

LINEAR = NoiseSchedule.linear()


def test_listed_timesteps():
    for name in ("ddpm", "ddim"):
        plan = planned(getattr(samplers, name), LINEAR, timesteps=(900, 37, 5))
        assert plan.timesteps == (900, 37, 5)
        # Every row starts at the level where the one before it ended.
        for row in plan:
            assert row.alpha == pytest.approx(math.sqrt(LINEAR.alphas_cumprod[int(row.t)]))
            assert row.alpha**2 + row.sigma**2 == pytest.approx(1)
    for bad in ((), (5, 5), (5, 6), (1000, 3), (3, -2), (-1, 3), (-1,)):
        with pytest.raises(ValueError, match="timesteps"):
            planned(samplers.ddpm, LINEAR, timesteps=bad)
    with pytest.raises(ValueError, match="steps"):
        planned(samplers.ddim, LINEAR, 4, timesteps=(3, 2))


def test_zero_terminal_snr(seed):
    """ᾱ = 0 at the first row: v and sample predictions work, ε has nothing to say."""
    schedule = LINEAR.rescale_zero_terminal_snr()
    for sampler, prediction in itertools.product((samplers.ddpm, samplers.ddim), ("v_prediction", "sample")):
        plan = sampler(schedule, 5, prediction=prediction, spacing="trailing")
        assert all(math.isfinite(c) for row in plan for c in row.x.values())
        x, m = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3)
        got = fastdiff.ops.update(x, m, plan, 0, return_x0=True, noise=torch.zeros_like(x))
        torch.testing.assert_close(got.x0, -m.double() if prediction == "v_prediction" else m.double())
    for sampler in (samplers.ddpm, samplers.ddim):
        with pytest.raises(ValueError, match="ᾱ is 0"):
            sampler(schedule, 5, spacing="trailing")


# ---- diffusers' stored numbers


@pytest.mark.parametrize(
    ("sampler", "steps", "prediction", "expected"),
    [
        ("ddpm", None, "epsilon", 258.9606),
        ("ddpm", None, "v_prediction", 202.0296),
        ("ddim", 10, "epsilon", 172.0067),
        ("ddim", 10, "v_prediction", 52.5302),
    ],
)
def test_stored_numbers(sampler, steps, prediction, expected):
    generator = torch.manual_seed(0)
    x = dummy_sample()
    got = fastdiff.sample(
        dummy, x.shape, sampler=sampler, steps=steps, prediction=prediction, clip=1.0,
        noise_fn=lambda stream, draw, shape: torch.randn(shape, generator=generator),
        x_T=x,
    )  # fmt: skip
    assert float(got.abs().sum()) == pytest.approx(expected, abs=1e-2)


# ---- what they refuse


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 1001}, ValueError, "steps"),
        ({"steps": 1.5}, TypeError, "steps"),
        ({"steps": True}, TypeError, "steps"),
        ({"prediction": "noise"}, ValueError, "prediction"),
        ({"spacing": "carras"}, ValueError, "spacing.*did you mean 'karras'"),
        ({"clip": 0.0}, ValueError, "clip"),
        ({"clip": -1.0}, ValueError, "clip"),
        ({"clip": math.nan}, ValueError, "clip"),
        ({"clip": True}, TypeError, "clip"),
        ({"clip": "1"}, TypeError, "clip"),
        ({"timesteps": 5}, TypeError, "timesteps"),
        ({"timesteps": ("5",)}, TypeError, "timesteps"),
        ({"spacing": "carras", "timesteps": (5,)}, ValueError, "spacing"),
    ],
)
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_refuses(name, arguments, error, names):
    with pytest.raises(error, match=names):
        planned(getattr(samplers, name), LINEAR, **arguments)


def test_refuses_its_own():
    for eta, error in ((1.5, ValueError), (-0.1, ValueError), (math.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="eta"):
            samplers.ddim(LINEAR, eta=eta)
    with pytest.raises(ValueError, match="variance"):
        samplers.ddpm(LINEAR, variance="fixed_small_log")
    for sampler in (samplers.ddpm, samplers.ddim):
        with pytest.raises(TypeError, match="schedule"):
            sampler("linear")
