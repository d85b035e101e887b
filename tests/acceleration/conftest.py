"""What the tests of accelerated networks share."""

import pytest
import torch
from helpers import assert_same_bits
from torch.utils._pytree import tree_leaves


@pytest.fixture(autouse=True)
def layers_left_alone(monkeypatch):
    """Small layers have their stand-ins here, which accelerate leaves alone for their speed; the rules by class."""
    from fastdiff.acceleration.layers import Conv, LayerNorm, Linear

    rules = {}
    for kind in (Conv, Linear, LayerNorm):
        rules[kind] = kind.no_gain_reason
        monkeypatch.setattr(kind, "no_gain_reason", classmethod(lambda cls, module: None))
    return rules


@pytest.fixture(autouse=True)
def replayed(request, monkeypatch):
    """In the matrix of networks each call is made until it is replayed, and all give the same bits."""
    if request.node.get_closest_marker("networks") is None:
        return
    from fastdiff.acceleration import replay
    from fastdiff.acceleration.network import Network

    enter = Network.enter

    def often(self, stand_in, args, kwargs):
        # What is asked before the call, which may write to a list that it is given; a hook may count how often it runs.
        usual = not self.unsuitable(args, kwargs) and replay.others_in(stand_in.module) is None
        alike = usual and self.replays.find(stand_in, args, kwargs) is not None
        out = enter(self, stand_in, args, kwargs)
        for _ in range(3 if alike and self.replays.serves else 0):
            again = enter(self, stand_in, args, kwargs)
            for a, b in zip(tree_leaves(again), tree_leaves(out), strict=True):
                if isinstance(a, torch.Tensor):
                    assert_same_bits(a, b)
            out = again
        return out

    monkeypatch.setattr(replay, "AFTER", 1)
    monkeypatch.setattr(replay, "LONGEST", 60)  # the first call binds
    monkeypatch.setattr(Network, "enter", often)


@pytest.fixture
def network(seed):
    pytest.importorskip("diffusers")
    from networks import small

    return small()


@pytest.fixture
def inputs(seed):
    from networks import SHAPE

    return torch.randn(SHAPE), torch.tensor([3, 900])
