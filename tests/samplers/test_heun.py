"""Heun's method against the textbook loop (Karras et al. 2022, Algorithm 2), with churn and on flows."""

import pytest
from samplers_onestep import cases, check_flows_start_without_signal, check_rows_say_where_they_start, check_walks

from fastdiff.schedules.level import PREDICTIONS

CASES = cases("heun")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_walks(seed, name, kind, prediction):
    check_walks(name, kind, prediction)


@pytest.mark.parametrize("prediction", ["flow_prediction", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["heun"])
def test_flows_start_without_signal(seed, name, prediction):
    check_flows_start_without_signal(name, prediction)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rows_say_where_they_start(seed, name, kind):
    check_rows_say_where_they_start(name, kind)
