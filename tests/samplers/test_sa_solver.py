"""SA-Solver against its loop with integrals by quadrature, and the samplers that it is at its ends."""

import itertools
import math

import pytest
import torch
from helpers import planned, spaced
from samplers_multistep import NODES, WEIGHTS, walk

from fastdiff import NoiseSchedule, samplers
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule

SCALED = NoiseSchedule.scaled_linear()


def integral(here, there, points, tau):
    """The weights of outputs at ``points`` in α' ∫ (1 + τ²) e^{−(1+τ²)(λ'−λ)} p dλ, p the polynomial through them."""
    a, b, rate = here.log_snr, there.log_snr, 1 + tau**2
    found = [0.0] * len(points)
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        lam = (a + b) / 2 + node * (b - a) / 2
        common = weight * (b - a) / 2 * there.alpha * rate * math.exp(-rate * (b - lam))
        for j, at in enumerate(points):
            others = [p for k, p in enumerate(points) if k != j]
            found[j] += common * math.prod((lam - p) / (at - p) for p in others)
    return found


@pytest.mark.parametrize(("predictor", "corrector"), list(itertools.product((1, 2, 3), (0, 1, 2, 3))))
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_the_loop(seed, predictor, corrector, tau):
    """Algorithm 1: predict, call the network, correct with the same noise, and never call it again there."""
    for schedule, lower in ((SCALED, False), (EDMSchedule(0.05, 12.0), True)):
        options = {"final": "sigma_min", "tau": tau, "s_tmin": 0.3, "s_tmax": 5.0, "s_noise": 1.1,
                   "predictor_order": predictor, "corrector_order": corrector, "lower_order_final": lower}  # fmt: skip
        plan = planned(samplers.sa_solver, schedule, 7, prediction="sample", **options)
        stops = spaced(schedule, 7, final="sigma_min")
        start = torch.randn(2, 5, dtype=torch.float64)
        noises = torch.randn(7, 2, 5, dtype=torch.float64)
        *_, got = walk(plan, start, lambda x, row, i: torch.sin(1.7 * x + i), noises)

        x = corrected = start
        outputs: list[torch.Tensor] = []
        base, noisy = start, 0.0
        for i, (here, there) in enumerate(itertools.pairwise(stops)):
            outputs.insert(0, torch.sin(1.7 * x * here.c_in + i))
            points = [stops[i - k].log_snr for k in range(len(outputs))]
            if i and corrector:
                count = min(corrector, len(outputs))
                parts = integral(stops[i - 1], here, points[:count], noisy)
                corrected = base + sum(w * f for w, f in zip(parts, outputs, strict=False))
            else:
                corrected = x
            noisy = tau if 0.3 <= here.ratio <= 5.0 else 0.0
            h = there.log_snr - here.log_snr
            base = there.sigma / here.sigma * math.exp(-(noisy**2) * h) * corrected
            base = base + 1.1 * there.sigma * math.sqrt(-math.expm1(-2 * noisy**2 * h)) * noises[i]
            count = min(predictor, len(outputs), 7 - i if lower else 9)
            parts = integral(here, there, points[:count], noisy)
            x = base + sum(w * f for w, f in zip(parts, outputs, strict=False))
        torch.testing.assert_close(got, x, rtol=1e-8, atol=1e-8)


def test_its_ends():
    """τ = 1 and one output is DDIM at η = 1; without a corrector it is DPM-Solver++'s SDE at η = τ²; τ = 0 its ODE."""
    for schedule, prediction in ((SCALED, "epsilon"), (FlowSchedule(), "flow_prediction")):
        first = samplers.sa_solver(schedule, 6, prediction=prediction, predictor_order=1, corrector_order=0)
        ddim = samplers.ddim(schedule, 6, prediction=prediction, eta=1.0, spacing="trailing")
        for a, b in zip(first, ddim, strict=True):
            assert (a.p * a.x["x0"] + a.x.get("x", 0), a.q * a.x["x0"], a.x.get("z", 0)) == pytest.approx(
                (b.p * b.x["x0"] + b.x.get("x", 0), b.q * b.x["x0"] + b.x.get("m", 0), b.x.get("z", 0)), abs=1e-12
            )
        for tau in (0.0, 0.7, 1.0):
            own = {"predictor_order": 3, "corrector_order": 0, "tau": tau, "lower_order_final": False}
            ours = samplers.sa_solver(schedule, 9, prediction=prediction, **own)
            theirs = samplers.dpm_multistep(
                schedule, 9, prediction=prediction, order=3, solver_type="exact", eta=tau**2, lower_order_final=False
            )
            for a, b in zip(ours, theirs, strict=True):
                assert a.x == pytest.approx(b.x)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"tau": -1.0}, ValueError, "tau"), ({"tau": "1"}, TypeError, "tau"), ({"s_tmin": -1.0}, ValueError, "s_tmin"),
        ({"s_tmin": 2.0, "s_tmax": 1.0}, ValueError, "s_tmax"), ({"s_noise": -1.0}, ValueError, "s_noise"),
        ({"predictor_order": 0}, ValueError, "predictor_order"),
        ({"predictor_order": 4}, ValueError, "predictor_order"),
        ({"corrector_order": 4}, ValueError, "corrector_order"),
        ({"corrector_order": 1.0}, TypeError, "corrector_order"),
    ],
)  # fmt: skip
def test_refuses(options, error, names):
    with pytest.raises(error, match=names):
        samplers.sa_solver(SCALED, 5, **options)
