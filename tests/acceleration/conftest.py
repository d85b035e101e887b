"""What the tests of accelerated networks share."""

import pytest
import torch


@pytest.fixture
def network(seed):
    pytest.importorskip("diffusers")
    from networks import small

    return small()


@pytest.fixture
def inputs(seed):
    from networks import SHAPE

    return torch.randn(SHAPE), torch.tensor([3, 900])
