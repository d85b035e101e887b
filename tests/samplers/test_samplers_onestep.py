"""The one- and two-stage samplers: whole walks against textbook loops in float64, what stands in the rows, identities.

LCM, TCD and the inversion have their formulas in test_samplers_consistency.py and test_ddim_inverse.py.
"""

import itertools
import math

import pytest
import torch
from helpers import planned
from samplers_onestep import CHURN, EDM, FLOW, LINEAR, SHAPE, run, tensors, textbook

import fastdiff
from fastdiff import samplers
from fastdiff.schedules.level import PREDICTIONS

LISTS = {
    "ve": (LINEAR, [100.0, 20.0, 5.0, 1.2, 0.3, 0.02]),
    "edm": (EDM, [80.0, 17.0, 2.5, 0.17, 0.002]),
    "flow": (FLOW, [0.99, 0.8, 0.45, 0.1, 0.02]),
}
NAMES = ("euler", "heun", "dpm2", "euler_ancestral", "dpm2_ancestral")
CASES = [case for case in itertools.product(NAMES, LISTS) if case != ("dpm2_ancestral", "flow")]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_walks(seed, name, kind, prediction):
    """Every sampler, state and prediction type, to σ = 0 and to σ > 0, clipped or not, with and without churn or η."""
    schedule, listed = LISTS[kind]
    ancestral = "ancestral" in name
    for end, clip, extra in itertools.product(([], [0.0]), (None, 1.0), (0, 1)):
        sigmas = listed + end
        options = {"eta": (0.6, 1.0)[extra]} if ancestral else CHURN if extra else {}
        plan = planned(getattr(samplers, name), schedule, prediction=prediction, clip=clip, sigmas=sigmas, **options)
        x = torch.randn(SHAPE, dtype=torch.float64) * sigmas[0]
        calls = sum(row.calls_model for row in plan)
        assert calls == (len(sigmas) - 1 if "euler" in name else 2 * (len(sigmas) - 1) - len(end))
        m, z = tensors(calls), tensors(len(plan))
        m = [o.float() for o in m]
        arguments = {"eta": options["eta"]} if ancestral else {"churn": options}
        exact = textbook(name, kind, sigmas, x, [o.double() for o in m], z, prediction, clip, **arguments)
        got = run(plan, x, m, z)
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max() + 1))


@pytest.mark.parametrize("prediction", ["flow_prediction", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "euler_ancestral"])
def test_flows_start_without_signal(seed, name, prediction):
    """σ = 1: no ε, and no churn; the rest as ever."""
    sigmas = [1.0, 0.7, 0.2, 0.0]
    options = {"s_noise": 1.0} if "ancestral" in name else CHURN | {"s_tmax": math.inf}
    plan = planned(getattr(samplers, name), FLOW, prediction=prediction, sigmas=sigmas, **options)
    assert plan[0].calls_model
    assert plan.init_sigma == 1
    x, m, z = torch.randn(SHAPE, dtype=torch.float64), tensors(5), tensors(8)
    m = [o.float() for o in m[: sum(row.calls_model for row in plan)]]
    exact = textbook(name, "flow", sigmas, x, [o.double() for o in m], z, prediction, None,
                     churn=None if "ancestral" in name else options)  # fmt: skip
    torch.testing.assert_close(run(plan, x, m, z), exact, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="epsilon"):
        planned(getattr(samplers, name), FLOW, 4)


def test_flow_euler_is_a_step_along_the_velocity(seed):
    plan = samplers.euler(FLOW, 6, prediction="flow_prediction")
    sigmas = [2 * u / (1 + u) for u in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0)]
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        x, v = tensors(2)
        v = v.float()
        assert plan[i].t == pytest.approx(1000 * sigma)
        torch.testing.assert_close(fastdiff.ops.update(x, v, plan, i).x, x + (after - sigma) * v.double())


# ---- what stands in the rows


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rows_say_where_they_start(seed, name, kind):
    """Given the true image, a row at (α, σ) sees α x_0 + σ ε; its t and c_in belong to that σ."""
    schedule, listed = LISTS[kind]
    options = {"eta": 0.7} if "ancestral" in name else CHURN
    plan = planned(getattr(samplers, name), schedule, prediction="sample", sigmas=[*listed, 0.0], **options)
    x0 = torch.full((1, 1), 0.5, dtype=torch.float64)
    # The noise of a state, as its coefficients of the independent draws; the first is x_T's.
    x = plan[0].alpha * x0 + plan.init_sigma * torch.eye(1, len(plan) + 1, dtype=torch.float64)
    assert plan.init_sigma == listed[0] == plan[0].sigma
    anchor = None
    for i, row in enumerate(plan):
        noise = x - row.alpha * x0
        assert float(noise.norm()) == pytest.approx(row.sigma, rel=1e-9), i
        ratio = row.sigma / row.alpha
        t = {"ve": lambda r: LINEAR.time_at(r), "edm": lambda r: math.log(r) / 4, "flow": lambda r: 1000 * r / (1 + r)}
        assert row.t == pytest.approx(t[kind](ratio))
        c_in = {"ve": 1 / math.sqrt(1 + ratio**2), "edm": 1 / math.sqrt(ratio**2 + 0.25), "flow": 1}[kind]
        assert row.c_in == pytest.approx(c_in)
        assert (row.p, row.q) == ((0, 1) if row.calls_model else (0, 0))
        z = torch.eye(1, len(plan) + 1, dtype=torch.float64).roll(i + 1, dims=1)
        if row.uses("z") and not row.calls_model:
            z = z / 1.01  # s_noise would raise the noise above its level
        m = x0.expand_as(x).contiguous() if row.calls_model else ()
        out = fastdiff.ops.update(x.contiguous(), m, plan, i, noise=z if row.uses("z") else None, anchor=anchor)
        x, anchor = out.x, out.anchor if out.anchor is not None else anchor
    torch.testing.assert_close(x, x0.expand_as(x), rtol=0, atol=1e-9)


def test_churn_has_its_own_rows():
    """γ = min(3/5, √2 − 1) at 20, 5, 1.2 and 0.3, and not at 100 or 0.02; no call is made there."""
    for name in ("euler", "heun", "dpm2"):
        plan = planned(getattr(samplers, name), LINEAR, sigmas=[*LISTS["ve"][1], 0.0], **CHURN)
        added = [i for i, row in enumerate(plan) if not row.calls_model]
        assert [plan[i].sigma for i in added] == [20, 5, 1.2, 0.3]
        for i in added:
            row, after = plan[i], plan[i + 1]
            assert after.sigma == pytest.approx(math.sqrt(2) * row.sigma)
            assert row.x == {"x": 1.0, "z": pytest.approx(1.01 * row.sigma)}
            assert plan.table()[i, 1] == after.c_in == pytest.approx(1 / math.sqrt(1 + after.sigma**2))
        assert all(row.uses("z") != row.calls_model for row in plan)
        few = planned(getattr(samplers, name), LINEAR, sigmas=[20.0, 5.0, 1.0], s_churn=0.2)
        assert few[1].sigma == pytest.approx(20 * 1.1)
        whole = planned(getattr(samplers, name), LINEAR, 7, spacing="karras", quantize=True, s_churn=2.0)
        assert whole.integer_timesteps
        none = planned(getattr(samplers, name), LINEAR, 7, s_tmin=1.0)
        assert [row.x for row in none] == [row.x for row in planned(getattr(samplers, name), LINEAR, 7)]


def test_starting_noise():
    """σ of the first level, as in k-diffusion; 1 where states are VP."""
    for name in NAMES:
        plan = planned(getattr(samplers, name), LINEAR, 5)
        assert plan.init_sigma == plan[0].sigma == pytest.approx(math.sqrt(1 / float(LINEAR.alphas_cumprod[999]) - 1))
        z = fastdiff.randn((1, 4), seed=3)
        _, first, *_ = fastdiff.sample_iter(lambda x, t: x, (1, 4), sampler=plan, seed=3)
        # x_T = σ z; a network that echoes its input c_in·x says ε = z c_in σ.
        row = plan[0]
        torch.testing.assert_close(first.x0, z * row.sigma * (1 - row.sigma * row.c_in), rtol=1e-5, atol=1e-2)
    for name in ("lcm", "tcd", "ddim_inverse"):
        assert planned(getattr(samplers, name), LINEAR, 5).init_sigma == 1


# ---- identities


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


def test_ancestral_noise_in_the_last_row():
    for name in ("euler_ancestral", "dpm2_ancestral"):
        plan = planned(getattr(samplers, name), LINEAR, 6)
        assert not plan[-1].uses("z")
        draws = [i for i, row in enumerate(plan) if row.uses("z")]
        assert draws == ([0, 1, 2, 3, 4] if name == "euler_ancestral" else [1, 3, 5, 7, 9])
        assert all(row.stream == 1 for row in plan)
        half_as_loud = planned(getattr(samplers, name), LINEAR, 6, s_noise=0.5)
        assert [half_as_loud[i].x["z"] * 2 for i in draws] == pytest.approx([plan[i].x["z"] for i in draws])
