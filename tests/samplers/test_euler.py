"""Euler's method against the textbook loop (Karras et al. 2022, Algorithm 2), with churn and on flows."""

import itertools

import pytest
import torch
from samplers_onestep import (
    FLOW,
    cases,
    check_flows_start_without_signal,
    check_rows_say_where_they_start,
    check_walks,
    tensors,
)

import fastdiff
from fastdiff import samplers
from fastdiff.schedules.level import PREDICTIONS

CASES = cases("euler")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_walks(seed, name, kind, prediction):
    check_walks(name, kind, prediction)


@pytest.mark.parametrize("prediction", ["flow_prediction", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["euler"])
def test_flows_start_without_signal(seed, name, prediction):
    check_flows_start_without_signal(name, prediction)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rows_say_where_they_start(seed, name, kind):
    check_rows_say_where_they_start(name, kind)


def test_flow_euler_is_a_step_along_the_velocity(seed):
    plan = samplers.euler(FLOW, 6, prediction="flow_prediction")
    sigmas = [2 * u / (1 + u) for u in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0)]
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        x, v = tensors(2)
        v = v.float()
        assert plan[i].t == pytest.approx(1000 * sigma)
        torch.testing.assert_close(fastdiff.ops.update(x, v, plan, i).x, x + (after - sigma) * v.double())
