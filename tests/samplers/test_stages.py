"""Churn: rows of their own before a step."""

import math

import pytest
from helpers import planned
from samplers_onestep import CHURN, LINEAR, LISTS

from fastdiff import samplers


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
