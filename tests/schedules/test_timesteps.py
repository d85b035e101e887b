"""The spacings of a table's indices: Lin et al. 2024, Table 2, and diffusers'."""

import itertools

import numpy as np
import pytest

from fastdiff import NoiseSchedule
from fastdiff.schedules.timesteps import SPACINGS, select

LINEAR = NoiseSchedule.linear()


def test_spacings():
    """Lin et al. 2024, Table 2: T = 1000, 10 steps (there counted from 1)."""
    assert select(len(LINEAR), 10, "leading") == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert select(len(LINEAR), 10, "trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert select(len(LINEAR), 10, "linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    for spacing in ("leading", "trailing", "linspace"):
        assert select(len(LINEAR), None, spacing) == list(range(999, -1, -1))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_number_of_steps(spacing):
    T = 60
    schedule = NoiseSchedule.linear(T)
    for steps in range(1, T + 1):
        chosen = select(len(schedule), steps, spacing)
        assert len(chosen) == steps
        assert all(a > b for a, b in itertools.pairwise(chosen))
        assert chosen[0] < T
        assert chosen[-1] >= 0
        assert chosen[0] == T - 1 or spacing == "leading" or (spacing == "linspace" and steps == 1)
        assert chosen[-1] == 0 or spacing == "trailing"


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_same_timesteps_as_diffusers(spacing):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    for steps in (1, 2, 3, 7, 10, 50, 333, 999, 1000):
        if spacing == "linspace" and steps == 1:
            continue  # theirs is t = 0, ours too; numpy's linspace warns
        scheduler.set_timesteps(steps)
        assert select(len(LINEAR), steps, spacing) == scheduler.timesteps.tolist(), steps


def test_quadratic_lists_of_any_length():
    """Song et al. 2021: DDIM's CIFAR-10 numbers are of 50 and 100 quadratic steps. No index is visited twice."""
    for steps in range(1, 1001):
        for spacing, top in (("quadratic", 999), ("ddim_quadratic", 800)):
            chosen = select(1000, steps, spacing)
            assert chosen[0] == (top if steps > 1 else 0)
            assert chosen[-1] == 0
            assert all(a > b for a, b in itertools.pairwise(chosen))
            assert len(chosen) <= steps
    assert len(select(1000, 45, "quadratic")) == 45


def test_ddim_s_own_list():
    """[int(s) for s in linspace(0, sqrt(0.8 T), S)²], the authors' code, but for the indices that it has twice."""
    for T, steps in itertools.product((1000, 400), (1, 2, 10, 20, 50, 100, 999)):
        theirs = [int(s) for s in list(np.linspace(0, np.sqrt(T * 0.8), min(steps, T)) ** 2)]
        assert select(T, min(steps, T), "ddim_quadratic") == sorted(set(theirs), reverse=True)
    assert select(1000, 10, "ddim_quadratic") == [800, 632, 483, 355, 246, 158, 88, 39, 9, 0]


def test_simple():
    """ComfyUI's: of the table from its end every T/steps-th entry, places rounded down."""
    assert select(1000, 3, "simple") == [999, 666, 333]
    for steps in (1, 7, 20, 33, 1000):
        table = list(range(1000))
        assert select(1000, steps, "simple") == [table[-(1 + int(x * (1000 / steps)))] for x in range(steps)]


def test_indices_are_ints():
    for spacing, steps in itertools.product(SPACINGS, (1, 2, 50, None)):
        assert all(type(t) is int for t in select(1000, steps, spacing))
