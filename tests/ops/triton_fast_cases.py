"""The blocks of a network by conv2d's kernel, as on a GPU whose tiles it suits. Run by test_triton.py."""

from __future__ import annotations

import sys

import pytest
import torch
from triton_cases import DEVICE

import fastdiff
from fastdiff.ops.conv2d import choice
from fastdiff.ops.conv2d import gemm_triton as triton_impl
from fastdiff.ops.conv2d.gemm import computes

CONFIG = {
    "sample_size": 8,
    "block_out_channels": (64, 128),
    "norm_num_groups": 16,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


@pytest.mark.parametrize("padding", [0, 1])
@torch.no_grad()
def test_a_network(seed, monkeypatch, padding):
    """The same function; every convolution but the first, with its shortcuts, by one kernel."""
    torch.backends.cudnn.allow_tf32 = False
    network = fastdiff.models.UNet(**CONFIG, downsample_padding=padding).eval().to(DEVICE)
    for p in network.parameters():
        if p.ndim == 1:
            p.add_(torch.randn_like(p) * 0.2)
    x, t = torch.randn(1, 3, 8, 8, device=DEVICE), torch.tensor([7], device=DEVICE)
    expected = network(x, t)
    kinds: list[tuple] = []
    launch = triton_impl.conv

    def count(out, x, inputs, weights, bias, residual, side, stride, low, up, counters):
        kinds.append((side, stride, low, up, len(inputs), residual is not None))
        assert counters is None or not counters.any()
        launch(out, x, inputs, weights, bias, residual, side, stride, low, up, counters)

    monkeypatch.setattr(triton_impl, "conv", count)
    choose = choice.select
    monkeypatch.setattr(
        sys.modules["fastdiff.ops.conv2d"], "select",
        lambda x, weight, geometry, inputs, pointwise, *rest: "gemm" if computes(weight, geometry, pointwise)
            else choose(x, weight, geometry, inputs, pointwise, *rest),
    )  # fmt: skip
    fastdiff.accelerate(network, dtype=torch.float32)
    got = network(x, t)
    assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-5
    found = set(kinds)
    assert {(3, 2, padding, False, 0, False), (2, 1, 1, True, 0, False), (3, 1, 1, False, 2, False)} <= found
    assert {(3, 1, 1, False, 0, True), (1, 1, 0, False, 0, False), (1, 1, 0, False, 0, True)} <= found
    assert len(kinds) == 2 * 8 + 2 * 4 + 3  # eight residual blocks, four attentions; down, up and the last
