"""Every sampler's coefficients, proven by its order of convergence where the answer is known (examples/convergence.py).

What is measured and how stands in docs/samplers.md, which examples/samplers_page.py wrote; the page is checked too.
"""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import history_plan

from fastdiff import NoiseSchedule, samplers
from fastdiff.ops.update import update
from fastdiff.plan.plan import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "examples" / "convergence.py").exists():
    pytest.skip("no examples beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT / "examples"))

import convergence  # noqa: E402
import mixture  # noqa: E402
from convergence import CASES, FITTED, NOISY, STEPS, exact_error, sampled, shipped_error, slope, variance_error  # noqa: E402

SHIPPED = [case for case in CASES if case.shipped]


@pytest.fixture(scope="module")
def page() -> dict[str, list[str]]:
    """The numbers of docs/samplers.md by the line's first cell."""
    lines = (ROOT / "docs" / "samplers.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {first: rest for first, *rest in cells}


def title(case) -> str:
    return case.title


# ---- the harness


def test_the_exact_flow_is_the_ode():
    """dx/dρ = ε for x/α over ρ = σ/α, by differences, at levels of every kind."""
    points = convergence.POINTS
    for ratio in (0.05, 0.7, 3.0, 30.0):
        h = 1e-4 * ratio
        after, before = (mixture.quantiles(points, 1.0, ratio + s * h) for s in (1, -1))
        _, epsilon = mixture.predict(mixture.quantiles(points, 1.0, ratio), 1.0, ratio)
        np.testing.assert_allclose((after - before) / (2 * h), epsilon, rtol=1e-6, atol=1e-6)
    for alpha, sigma in ((0.6, 0.8), (0.25, 0.75), (0.0, 1.0), (1.0, 0.0)):
        x = mixture.quantiles(points, alpha, sigma)
        x0, epsilon = mixture.predict(x, alpha, sigma)
        np.testing.assert_allclose(alpha * x0 + sigma * epsilon, x, rtol=1e-13, atol=1e-13)
        if alpha:  # scaling a state does not change what it says
            np.testing.assert_allclose(x, alpha * mixture.quantiles(points, 1.0, sigma / alpha), rtol=1e-12, atol=1e-13)


def test_the_denoiser_is_bayes_rule():
    """E[x_0 | x] by summing over a fine grid of x_0."""
    grid = np.linspace(-6, 6, 20001)
    prior = sum(w / d * np.exp(-0.5 * ((grid - m) / d) ** 2) for w, m, d in
                zip(mixture.WEIGHTS[:, 0], mixture.MEANS[:, 0], mixture.DEVIATIONS[:, 0], strict=True))  # fmt: skip
    for alpha, sigma in ((1.0, 0.5), (0.6, 0.8), (0.3, 0.7)):
        for x in (-1.5, 0.1, 0.9):
            posterior = prior * np.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2)
            x0, _ = mixture.predict(np.array([x]), alpha, sigma)
            assert x0[0] == pytest.approx(posterior @ grid / posterior.sum(), rel=1e-9)


def test_rows_are_run_as_the_update_runs_them(seed):
    """``mixture.run`` beside ``ops.update`` on float64, for every kind of term."""
    plans = [history_plan(), samplers.unipc(NoiseSchedule.linear(), 6, order=3),
             samplers.heun(NoiseSchedule.linear(), 4, s_churn=3.0, clip=1.0)]  # fmt: skip
    for plan in plans:
        start, noises = torch.randn(1, 7, dtype=torch.float64), torch.randn(len(plan), 1, 7, dtype=torch.float64)
        x, anchor, slots = start.clone(), torch.zeros_like(start), [torch.zeros_like(start) for _ in range(4)]
        for i, row in enumerate(plan):
            outputs = (torch.cos(row.c_in * x) + 0.01 * row.t,) if row.calls_model else ()
            done = update(x, outputs, plan, i, anchor=anchor, slots=slots, noise=noises[i])
            x, anchor = done.x, anchor if done.anchor is None else done.anchor
            if done.slot is not None:
                slots[row.write] = done.slot
        got = mixture.run(
            plan, lambda x, t: np.cos(x) + 0.01 * t, start[0].numpy(), noise=lambda i, n=noises: n[i, 0].numpy()
        )
        np.testing.assert_allclose(got, x[0].numpy(), rtol=1e-12, atol=1e-12)
    assert len(COLUMNS) == 48  # a new column is a new term for ``run`` to know


def test_the_slope():
    assert slope(STEPS, [0.3 * n**-2.0 for n in STEPS]) == pytest.approx(2)
    outside = [1.0, 0.5, *(7.0 * n**-3.0 for n in STEPS[2:5]), 1e-13, 1e-13]
    assert FITTED == (1e-11, 1e-2)
    assert slope(STEPS, outside) == pytest.approx(3)
    with pytest.raises(ValueError, match="fewer than two"):
        slope(STEPS, [1.0] * 7)


def test_a_wrong_coefficient_shows():
    """What the bounds are worth: 1 % off in a coefficient of one sampler, and no order is left."""
    good = samplers.SAMPLERS["dpmpp_2m"]

    def wrong(*args, **kwargs):
        plan = good(*args, **kwargs)
        rows = [dataclasses.replace(row, x={**row.x, "slot0": 1.01 * row.x.get("slot0", 0.0)}) for row in plan]
        return dataclasses.replace(plan, rows=tuple(rows))

    case = next(case for case in CASES if case.title == "`dpmpp_2m`")
    before = samplers.SAMPLERS["dpmpp_2m"]
    try:
        samplers.SAMPLERS["dpmpp_2m"] = wrong
        found = slope(STEPS, [exact_error(case, "VP", steps) for steps in STEPS])
    finally:
        samplers.SAMPLERS["dpmpp_2m"] = before
    assert abs(found - 2) > 0.25


# ---- the samplers


def test_every_sampler_is_studied():
    studied = {case.sampler for case in (*CASES, *NOISY)} | {"lcm", "tcd"}
    assert studied == set(samplers.SAMPLERS)
    assert {case.sampler for case in SHIPPED} == {case.sampler for case in CASES} - {"ddim_inverse", "sa_solver"}
    assert len({case.title for case in (*CASES, *NOISY)}) == len(CASES) + len(NOISY)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=title)
def test_the_order_is_the_theory_s(case, page):
    order = slope(STEPS, [exact_error(case, "VP", steps) for steps in STEPS])
    assert order == pytest.approx(case.order, abs=0.25)
    assert order == pytest.approx(float(page[case.title][3]), abs=0.02)
    assert page[case.title][2] == str(case.order)


@pytest.mark.slow
@pytest.mark.parametrize("process", ["VE", "flow"])
@pytest.mark.parametrize("case", CASES, ids=title)
def test_the_order_is_the_same_for_other_processes(case, process, page):
    steps = STEPS[-2:] if case.order == 1 else STEPS[3:5]
    assert slope(steps, [exact_error(case, process, n) for n in steps]) == pytest.approx(case.order, abs=0.25)
    assert float(page[case.title][4 if process == "VE" else 5]) == pytest.approx(case.order, abs=0.25)


@pytest.mark.parametrize("case", SHIPPED, ids=title)
def test_as_shipped(case, page):
    order = slope(STEPS, [shipped_error(case, steps) for steps in STEPS])
    assert order >= min(case.order, 2) - 0.25
    assert order == pytest.approx(float(page[case.title][6]), abs=0.02)


@pytest.mark.parametrize("case", NOISY, ids=title)
def test_the_variance_s_order(case, page):
    steps = STEPS[-2:] if case.order == 1 else STEPS[2:6]
    assert slope(steps, [variance_error(case, "VP", n) for n in steps]) == pytest.approx(case.order, abs=0.25)
    assert float(page[case.title][3]) == pytest.approx(case.order, abs=0.25)


def check(found, page_line: list[str]) -> None:
    """Four standard errors of each moment; two samples of 100,000 that differ by less than a p of 0.001 allows."""
    assert max(map(abs, found.moments)) < 4
    assert found.distance < 1.95 * math.sqrt(2 / 100_000)
    assert found.distance == pytest.approx(float(page_line[-2]), abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", NOISY, ids=title)
def test_the_distribution(case, page):
    check(sampled(case), page[case.title])


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_the_distribution_of_a_distilled_network(name, page):
    check(convergence.distilled(name, 4), page[f"`{name}`"])
