"""Ancestral Euler against the textbook loop, and which rows of an ancestral sampler draw noise."""

import pytest
from helpers import planned
from samplers_onestep import (
    LINEAR,
    cases,
    check_flows_start_without_signal,
    check_rows_say_where_they_start,
    check_walks,
)

from fastdiff import samplers
from fastdiff.schedules.level import PREDICTIONS

CASES = cases("euler_ancestral")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_walks(seed, name, kind, prediction):
    check_walks(name, kind, prediction)


@pytest.mark.parametrize("prediction", ["flow_prediction", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["euler_ancestral"])
def test_flows_start_without_signal(seed, name, prediction):
    check_flows_start_without_signal(name, prediction)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rows_say_where_they_start(seed, name, kind):
    check_rows_say_where_they_start(name, kind)


def test_ancestral_noise_in_the_last_row():
    for name in ("euler_ancestral", "dpm2_ancestral"):
        plan = planned(getattr(samplers, name), LINEAR, 6)
        assert not plan[-1].uses("z")
        draws = [i for i, row in enumerate(plan) if row.uses("z")]
        assert draws == ([0, 1, 2, 3, 4] if name == "euler_ancestral" else [1, 3, 5, 7, 9])
        assert all(row.stream == 1 for row in plan)
        half_as_loud = planned(getattr(samplers, name), LINEAR, 6, s_noise=0.5)
        assert [half_as_loud[i].x["z"] * 2 for i in draws] == pytest.approx([plan[i].x["z"] for i in draws])
