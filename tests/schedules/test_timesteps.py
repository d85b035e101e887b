"""The spacings of a table's indices: Lin et al. 2024, Table 2, and diffusers'."""

import itertools

import pytest

from fastdiff import NoiseSchedule
from fastdiff.schedules.timesteps import select

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
