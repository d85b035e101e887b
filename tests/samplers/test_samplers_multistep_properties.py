"""Multistep and exponential-integrator samplers: integrals, identities, orders of convergence, infinite λ."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from helpers import planned, spaced
from samplers_multistep import walk

from fastdiff import NoiseSchedule, samplers
from fastdiff.samplers.exponential import moments, phi, weights
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule

VP = NoiseSchedule.scaled_linear()
NAMES = (
    "lms", "pndm", "dpm_multistep", "dpm_singlestep", "dpm_solver_2", "dpm_solver_3", "dpmpp_1s", "dpmpp_2s",
    "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde", "deis", "unipc",
)  # fmt: skip
# Options under which a sampler's rows read and write the most.
FULL = {
    "pndm": {"skip_prk_steps": False}, "unipc": {"order": 3}, "deis": {"order": 3},
    "dpm_solver_3": {"solver_type": "heun"},
    "dpm_singlestep": {"order": 3, "solver_type": "heun", "eta": 1.0}, "dpm_multistep": {"order": 3, "eta": 0.5},
}  # fmt: skip


# ---- integrals


def exact_phi(k, z):
    """Σ z^j/(j + k)! in rational numbers."""
    z, total, term = Fraction(z), Fraction(0), Fraction(1, math.factorial(k))
    for j in range(1, 130):
        total += term
        term *= z / (j + k)
    return float(total)


def test_phi(rng):
    numbers = [0.0, 2.0**-40, -(2.0**-30), 1 - 2.0**-20, 1.0, -1.0, 20.0, -30.0]
    for z in [*numbers, *(rng.randrange(-512, 512) / 64 for _ in range(40))]:
        for k in (1, 2, 3, 4):
            assert phi(k, z) == pytest.approx(exact_phi(k, z), rel=1e-13), (k, z)


def test_weights_integrate_polynomials(rng):
    """Σ w_j f(τ_j) = ∫ z e^{(1−τ)z} f(τ) dτ for every f of degree below the number of outputs; short steps too."""
    for z, count in itertools.product((-7.0, -0.3, 1e-6, 0.8, 5.0), (0, 1, 2, 3)):
        nodes = [-rng.uniform(0.3, 0.9) - i for i in range(count)]
        found = weights(nodes, moments(z, count))
        for degree in range(count + 1):
            total = sum(w * tau**degree for w, tau in zip(found, [0.0, *nodes], strict=True))
            exact = z * math.factorial(degree) * exact_phi(degree + 1, z)
            size = sum(abs(w * tau**degree) for w, tau in zip(found, [0.0, *nodes], strict=True))
            assert total == pytest.approx(exact, rel=1e-12, abs=1e-13 * size)


# ---- identities


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


@pytest.mark.parametrize("name", NAMES)
def test_constant_prediction_is_reached(seed, name):
    """A network that always returns the same x_0 (ε for those that integrate ε) is followed without error."""
    noise_form = name in ("lms", "pndm", "deis", "dpm_solver_2", "dpm_solver_3")
    y = torch.randn(2, 4, dtype=torch.float64)
    plan = planned(getattr(samplers, name), VP, 7, prediction="epsilon" if noise_form else "sample", final="sigma_min")
    x = torch.randn(2, 4, dtype=torch.float64)
    noises = [torch.zeros_like(x) for _ in plan]
    *_, last = walk(plan, x, lambda x, row, i: y, noises)
    end, start = (VP.as_ve() if name == "lms" else VP).level(0), plan[0]
    if noise_form:
        exact = end.alpha / start.alpha * (x - start.sigma * y) + end.sigma * y
    else:
        # At η = 1, where the noise that z would refill is left out, e^{−h} more of the difference goes.
        share = end.ratio * start.alpha / start.sigma if any(row.uses("z") for row in plan) else 1.0
        exact = end.alpha * y + end.sigma / start.sigma * share * (x - start.alpha * y)
    torch.testing.assert_close(last, exact, rtol=1e-10, atol=1e-10)


# ---- orders of convergence


def gaussian(mean=0.4):
    """A float64 network with the exact ε of Gaussian data, and the probability flow's exact solution."""
    deviation = torch.tensor([0.2, 0.4, 0.7, 1.0, 1.6], dtype=torch.float64)

    def model(x, row, i):
        x, a, s = x / row.c_in, row.alpha, row.sigma
        return s * (x - a * mean) / (a * a * deviation**2 + s * s)

    def flow(x, here, there):
        size = [((level.alpha * deviation) ** 2 + level.sigma**2).sqrt() for level in (here, there)]
        return there.alpha * mean + size[1] / size[0] * (x - here.alpha * mean)

    return model, flow


ORDERS = [
    *(("lms", {"order": p}, p, p - 1) for p in (1, 2, 3, 4)),
    *(("deis", {"order": p}, p, p - 1) for p in (1, 2, 3)),
    *(("dpm_multistep", {"order": 2, "solver_type": t, "algorithm": a}, 2, 1)
      for t in ("midpoint", "heun") for a in ("dpmsolver", "dpmsolver++")),
    ("dpmpp_3m", {"solver_type": "exact"}, 3, 2),
    ("dpmpp_3m", {"solver_type": "midpoint"}, 2, 2),  # as published
    *(("unipc", {"order": p, "solver_type": b, "predict_x0": d}, p + 1, p)
      for p in (1, 2, 3) for b in ("bh1", "bh2") for d in (True, False)),
    *(("unipc", {"order": p, "disable_corrector": range(999)}, p, p - 1) for p in (1, 2, 3)),
    ("dpmpp_2s", {}, 2, 0), ("dpmpp_2s", {"solver_type": "heun"}, 2, 0), ("dpm_solver_2", {}, 2, 0),
    ("dpm_solver_3", {}, 3, 0), ("dpm_solver_3", {"solver_type": "heun"}, 3, 0),
    ("dpm_singlestep", {"order": 3, "stages": "inserted"}, 3, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "theory", "exact_rows"), ORDERS)
def test_order_of_convergence(name, options, theory, exact_rows):
    """From an exact start in float64 to σ_min, the slope of ln(error) against ln(steps) is the order, within 0.25."""
    schedule = EDMSchedule(0.1, 5.0)
    model, flow = gaussian()
    x = torch.tensor([[-3.0, 1.0, 5.0, 8.0, -2.0]], dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160):
        sigmas = [5.0 * (0.1 / 5.0) ** (i / steps) for i in range(steps + 1)]
        points = spaced(schedule, sigmas=sigmas)
        own = {} if name in ("lms", "dpmpp_2s", "dpm_solver_2", "dpm_solver_3") else {"lower_order_final": False}
        plan = planned(getattr(samplers, name), schedule, sigmas=sigmas, **own, **options)
        exact = [flow(x, points[0], level) for level in points]

        def mend(i, x, anchor, exact=exact):
            return (exact[i + 1], None if anchor is None else exact[i]) if i < exact_rows else (x, anchor)

        *_, last = walk(plan, x, model, mend=mend)
        errors.append(float((last - exact[-1]).square().mean().sqrt()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert 1e-12 < errors[-1] < 1e-2
    assert abs(slopes[-1] - theory) < 0.25, (errors, slopes)


# ---- infinite λ at the ends


def test_no_signal_at_the_start(seed):
    """Where ᾱ is 0 the first step is exact for x̂_0, and its output is of no use to the next step's polynomial."""
    x = torch.randn(2, 4, dtype=torch.float64)
    names = ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s", "dpmpp_sde", "dpmpp_2s_ancestral",
             "dpm_singlestep", "unipc")  # fmt: skip
    runs = [(VP.rescale_zero_terminal_snr(), "v_prediction"), (FlowSchedule(), "flow_prediction")]
    for (schedule, prediction), name in itertools.product(runs, names):
        plan = planned(getattr(samplers, name), schedule, 6, prediction=prediction)
        z = [torch.randn(2, 4, dtype=torch.float64) for _ in plan]
        states = list(walk(plan, x, lambda x, row, i: torch.sin(x + i), z))
        # At α = 0, x is all noise: v is −x_0 and the flow's velocity x − x_0.
        x0 = -torch.sin(x) if prediction == "v_prediction" else x - torch.sin(x)
        to = spaced(schedule, 6)[1]
        exact = to.alpha * x0 + to.sigma * (z[0] if plan[0].uses("z") else x)
        torch.testing.assert_close(states[0], exact, rtol=1e-12, atol=1e-12)
        assert all(bool(state.isfinite().all()) for state in states)
        if len(plan) == 6 and name.startswith("dpmpp"):
            assert not plan[1].uses("slot0")
            assert plan[2].uses("slot0")
    for name in ("lms", "pndm", "deis", "dpm_solver_2", "dpm_solver_3"):
        with pytest.raises(ValueError, match=r"is 0|signal|infinite"):
            planned(getattr(samplers, name), FlowSchedule(), 6, prediction="flow_prediction")
    with pytest.raises(ValueError, match="bh1"):
        samplers.unipc(FlowSchedule(), 6, prediction="flow_prediction", solver_type="bh1")


@pytest.mark.parametrize("name", NAMES)
def test_the_last_step_ends_at_the_prediction(seed, name):
    """With final="zero" the last row's x' is its x̂_0, whatever the order, but for Adams and Bashforth's rules."""
    if name in ("lms", "pndm"):
        return
    x = torch.randn(2, 4, dtype=torch.float64)
    options = {"lower_order_final": False} if name in ("dpm_multistep", "dpmpp_2m", "dpmpp_3m", "deis", "unipc") else {}
    plan = planned(getattr(samplers, name), VP, 6, prediction="sample", **options)
    *_, last = walk(plan, x, lambda x, row, i: x * 0 + i, [x] * len(plan))
    torch.testing.assert_close(last, torch.full_like(x, len(plan) - 1.0), rtol=0, atol=1e-9)
