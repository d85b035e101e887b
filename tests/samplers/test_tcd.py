"""TCD against the float64 formula of its paper, and where it lands."""

import itertools
import math

import pytest
import torch
from distilled import LINEAR, bar_at, tensors, vp_pair

import fastdiff
from fastdiff import Spacing, samplers


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
