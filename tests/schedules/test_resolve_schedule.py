"""A schedule by its name, or as it is."""

import pytest

from fastdiff import NoiseSchedule
from fastdiff.schedules.resolve import resolve_table

NAMES = ("linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_betas")


def test_named():
    for name in NAMES:
        assert resolve_table(name) == getattr(NoiseSchedule, name)()
    mine = NoiseSchedule.linear(3)
    assert resolve_table(mine) is mine
    with pytest.raises(ValueError, match="schedule"):
        resolve_table("from_betas")
    with pytest.raises(TypeError, match="schedule"):
        resolve_table(None)
