"""A doubled image by summed weights, where oneDNN does not serve: a second layout takes the weights of the first."""

import torch

from fastdiff.ops.conv2d import library


def test_weights_are_summed_once(monkeypatch):
    monkeypatch.setattr(library, "onednn", lambda x: False)
    geometry, packed = None, {}  # the geometry is not looked at here
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    first, second = (library._phases(x, weight, None, geometry, None, packed)(x) for _ in range(2))
    assert torch.equal(first, second)
