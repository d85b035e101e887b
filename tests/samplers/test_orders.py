"""Multistep and singlestep samplers' orders of convergence, in float64 from an exact start."""

import itertools
import math

import pytest
import torch
from helpers import planned, spaced
from samplers_multistep import walk

from fastdiff import samplers
from fastdiff.schedules.continuous import EDMSchedule


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
