"""LCM and TCD against float64 formulas of their papers, their boundary conditions and their timesteps."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule, Spacing, samplers

LINEAR = NoiseSchedule.linear()
SHAPE = (2, 3, 4, 4)


def tensors(count: int) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=torch.float64) for _ in range(count)]


def bar_at(t: int) -> float:
    return float(LINEAR.alphas_cumprod[t])


def vp_pair(prediction: str, x: Tensor, m: Tensor, bar: float) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε) at ᾱ."""
    a, s = math.sqrt(bar), math.sqrt(1 - bar)
    if prediction == "epsilon":
        return (x - s * m) / a, m
    if prediction == "v_prediction":
        return a * x - s * m, s * x + a * m
    return m, (x - a * m) / s


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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd(seed, eta, prediction):
    for clip, final in itertools.product((None, 1.0), ("zero", "sigma_min")):
        plan = samplers.tcd(LINEAR, 4, prediction=prediction, clip=clip, eta=eta, spacing=Spacing(final=final))
        ts = [int(row.t) for row in plan]
        assert ts == [999, 759, 499, 259]
        landing = {0.0: [759, 499, 259], 0.3: [531, 349, 181], 1.0: [0, 0, 0]}[eta]  # ⌊(1 − η) t'⌋
        x, m, z = tensors(3)
        for i, t in enumerate(ts):
            bar = bar_at(t)
            x0, epsilon = vp_pair(prediction, x, m, bar)
            if clip:
                x0 = x0.clamp(-clip, clip)
                epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
            last = 1.0 if final == "zero" else bar_at(0)
            after, s = (bar_at(ts[i + 1]), bar_at(landing[i])) if i < 3 else (last, last)
            exact = math.sqrt(after / s) * (math.sqrt(s) * x0 + math.sqrt(1 - s) * epsilon)
            exact = exact + math.sqrt(1 - after / s) * z
            got = fastdiff.ops.update(x, m, plan, i, noise=z).x
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))
        assert [row.uses("z") for row in plan] == [eta > 0] * 3 + [False]


def test_tcd_without_eta_is_ddim():
    a = samplers.tcd(LINEAR, 6, eta=0.0, spacing=Spacing(final="zero"))
    b = samplers.ddim(LINEAR, spacing=Spacing(timesteps=a.timesteps), use_clipped_model_output=True)
    for r, s in zip(a, b, strict=True):
        assert (r.t, r.p, r.q) == (s.t, s.p, s.q)
        for term in ("x", "x0"):
            assert r.x[term] == pytest.approx(s.x[term], rel=1e-9, abs=1e-12)


def test_tcd_lands_where_it_says():
    """⌊0.7·10⌋ is 7, whatever 1 − 0.3 is in binary."""
    for eta in (0.1, 0.3, 0.35, 0.7, 0.9):
        hundredths = round(100 * (1 - eta))
        for t in range(20, 1000, 20):
            plan = samplers.tcd(LINEAR, spacing=Spacing(timesteps=[999, t]), eta=eta)
            s, after = bar_at(hundredths * t // 100), bar_at(t)
            assert plan[0].x["z"] == pytest.approx(math.sqrt(1 - after / s), rel=1e-9), (eta, t)


def test_distilled_timesteps():
    """k − 1, 2k − 1, … from the top, at every original/steps-th place; lists and spacings take their place."""
    assert samplers.tcd(LINEAR, 3, original_inference_steps=10).timesteps == (999, 699, 399)
    assert samplers.lcm(LINEAR, None, original_inference_steps=5).timesteps == (999, 799, 599, 399, 199)
    assert samplers.lcm(LINEAR, 4, spacing="trailing").timesteps == (999, 749, 499, 249)
    assert samplers.lcm(LINEAR, spacing=Spacing(timesteps=[900, 3])).timesteps == (900, 3)
    assert samplers.tcd(LINEAR, spacing=Spacing(sigmas=[5.0, 1.0, 0.0]))[0].sigma == pytest.approx(5 / math.sqrt(26))
