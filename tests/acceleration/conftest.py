"""What the tests of accelerated networks share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def layers_left_alone(monkeypatch):
    """Small layers have their stand-ins here, which accelerate leaves alone for their speed; the rules by class."""
    from fastdiff.acceleration.layers import Conv, LayerNorm, Linear

    rules = {}
    for kind in (Conv, Linear, LayerNorm):
        rules[kind] = kind.no_gain_reason
        monkeypatch.setattr(kind, "no_gain_reason", classmethod(lambda cls, module: None))
    return rules


@pytest.fixture
def network(seed):
    pytest.importorskip("diffusers")
    from networks import small

    return small()


@pytest.fixture
def inputs(seed):
    from networks import SHAPE

    return torch.randn(SHAPE), torch.tensor([3, 900])
