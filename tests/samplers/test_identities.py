"""Identities between samplers: where two of them are one, and VE states are scaled VP states."""

import itertools

import pytest
import torch
from helpers import planned
from multistep_cases import FULL, NAMES, VP
from samplers_multistep import walk
from samplers_onestep import LINEAR, LISTS, tensors

import fastdiff
from fastdiff import samplers


def network(prediction):
    def model(x, row, i):
        a, s = row.alpha, row.sigma
        x = x / row.c_in
        x0 = torch.tanh(x * a / (a * a + s * s) + 0.3)
        return {"sample": x0, "epsilon": (x - a * x0) / s}[prediction]

    return model


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_first_order_is_ddim(seed, prediction):
    """With and without noise; order 1 of every family is the same step (Lu et al. 2022a, Section 4.1)."""
    x = torch.randn(2, 4, dtype=torch.float64)
    for options in ({"steps": 9}, {"steps": 9, "final": "sigma_min"}):
        own = {"prediction": prediction, **options}
        ddim = planned(samplers.ddim, VP, **own, spacing="trailing")
        same = [
            planned(samplers.dpmpp_1s, VP, **own), planned(samplers.lms, VP, order=1, ve=False, **own),
            planned(samplers.deis, VP, order=1, **own), planned(samplers.dpm_singlestep, VP, order=1, **own),
            planned(samplers.unipc, VP, order=1, disable_corrector=range(9), **own),
            planned(samplers.unipc, VP, order=1, predict_x0=False, disable_corrector=range(9), **own),
            planned(samplers.dpm_singlestep, VP, order=1, algorithm="dpmsolver", **own),
        ]  # fmt: skip
        for plan in same:
            pairs = zip(walk(ddim, x, network(prediction)), walk(plan, x, network(prediction)), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        # SDE-DPM-Solver++ of order 1 adds √(1 − e^{−2h}) σ' of noise, as DDIM does at η = 1, and has its mean.
        noises = [torch.randn(2, 4, dtype=torch.float64) for _ in range(9)]
        ddim = planned(samplers.ddim, VP, eta=1.0, **own, spacing="trailing")
        for make in (samplers.dpm_multistep, samplers.dpm_singlestep):
            plan = planned(make, VP, order=1, eta=1.0, **own)
            pairs = zip(*(walk(p, x, network(prediction), noises) for p in (ddim, plan)), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pndm"])
def test_ve_states_are_scaled_vp_states(seed, name):
    x = torch.randn(2, 4, dtype=torch.float64)
    options = FULL.get(name, {}) | {"prediction": "sample", "steps": 8}
    vp, ve = (planned(getattr(samplers, name), VP, ve=ve, **options) for ve in (False, True))
    noises = [torch.randn(2, 4, dtype=torch.float64) for _ in vp]
    after = [*(row.alpha for row in vp.rows[1:]), 1.0]
    states = zip(
        walk(vp, x, network("sample"), noises), walk(ve, x / vp[0].alpha, network("sample"), noises), after, strict=True
    )
    for a, b, alpha in states:
        torch.testing.assert_close(a, alpha * b, rtol=1e-10, atol=1e-10)
    assert ve.init_sigma == pytest.approx(VP.sigma_max)
    assert vp.init_sigma == 1


@pytest.mark.parametrize("kind", LISTS)
def test_without_eta_ancestral_is_plain(kind):
    schedule, listed = LISTS[kind]
    for end in ([], [0.0]):
        pairs = [("euler_ancestral", "euler")] + ([("dpm2_ancestral", "dpm2")] if kind != "flow" else [])
        for a, b in pairs:
            one = planned(getattr(samplers, a), schedule, sigmas=listed + end, eta=0.0)
            two = planned(getattr(samplers, b), schedule, sigmas=listed + end)
            assert len(one) == len(two)
            for r, s in zip(one, two, strict=True):
                assert (r.t, r.alpha, r.sigma, r.c_in, r.p, r.q, r.anchor) == (s.t, s.alpha, s.sigma, s.c_in, s.p, s.q,
                                                                              s.anchor)  # fmt: skip
                assert not r.uses("z")
                assert r.x | {"z": 0} == s.x | {"z": 0}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_euler_is_ddim_rescaled(seed, prediction):
    """x_VE = x_VP/√ᾱ, and both networks see the same input."""
    for spacing, (a, b) in itertools.product(
        ("trailing", "karras"), ((samplers.euler, 0), (samplers.euler_ancestral, 1))
    ):
        options = {"prediction": prediction, "spacing": spacing}
        ve, vp = a(LINEAR, 9, **options), samplers.ddim(LINEAR, 9, eta=b, **options)
        for i in range(9):
            x, m, z = tensors(3)
            m = m.float()
            one = fastdiff.ops.update(x / vp[i].alpha, m, ve, i, noise=z, model_dtype=torch.float32)
            two = fastdiff.ops.update(x, m, vp, i, noise=z, model_dtype=torch.float32)
            alpha = vp[i + 1].alpha if i < 8 else 1
            assert ve[i].c_in == pytest.approx(vp[i].alpha)
            torch.testing.assert_close(one.x * alpha, two.x, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(one.model_input, two.model_input, rtol=1e-5, atol=1e-5)
