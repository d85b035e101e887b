"""accelerate and restore on networks: what they report, refuse and leave alone."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
from networks import SHAPE, close, randomized, usual

import fastdiff
from fastdiff.acceleration import layers
from fastdiff.acceleration.network import network_of

# ---- the report


def test_the_report_is_a_table(network):
    report = fastdiff.accelerate(network, dtype=torch.bfloat16)
    lines = str(report).splitlines()
    assert lines[0] == "fastdiff.UNet, computing in bfloat16, channels_last:"
    assert any(line.split()[:2] == ["8", "ResnetBlock"] for line in lines)
    assert len({line.index(line.split()[1]) for line in lines[1:]}) == 1  # one column
    counts = {kind: count for kind, count, _ in report.networks[""].changed}
    assert counts["Attention"] == 4
    assert "Linear" not in counts  # those of the blocks are not counted again
    assert report.networks[""].kept == ()


def test_what_is_not_known_is_left_alone_and_named(seed):
    case = usual()
    before = case.call(case.network, torch.float32)
    report = fastdiff.accelerate(case.network, dtype=torch.bfloat16)
    assert [(kind, count) for kind, count, _ in report.networks[""].kept] == [("Conv2d", 1)]
    assert "as it was: padding 'circular'" in str(report)
    assert "1 Usual" in str(report)
    assert close(case.call(case.network, torch.float32), before, 0.03)


def test_a_subclass_is_not_its_class(seed):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    network = randomized(nn.Sequential(Doubled(3, 8, 3), nn.Conv2d(8, 3, 1)))
    x = torch.randn(SHAPE)
    before = network(x)
    fastdiff.accelerate(network, dtype=torch.float32)
    assert "forward" not in network[0].__dict__
    assert close(network(x), before)


# ---- what is refused


def test_errors(network, inputs):
    with pytest.raises(ValueError, match="UNet is not accelerated"):
        fastdiff.restore(network)
    for bad in (3, lambda x: x, "model", None):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module or a diffusers pipeline; got"):
            fastdiff.accelerate(bad)
        with pytest.raises(TypeError, match=r"torch\.nn\.Module or a diffusers pipeline; got"):
            fastdiff.restore(bad)
    for bad, error in (("half", ValueError), (torch.float64, ValueError), (16, TypeError), (None, TypeError)):
        with pytest.raises(error, match="dtype must be"):
            fastdiff.accelerate(network, dtype=bad)
    with pytest.raises(ValueError, match="in training mode"):
        fastdiff.accelerate(network.train())
    network.eval()
    with pytest.raises(ValueError, match="nothing in this Sequential is known"):
        fastdiff.accelerate(nn.Sequential(nn.Tanh(), nn.PReLU()).eval())
    assert not any("forward" in m.__dict__ for m in network.modules())
    report = fastdiff.accelerate(network)
    assert fastdiff.accelerate(network) is report  # a notebook's cell that is run twice
    with pytest.raises(ValueError, match="accelerated already, with dtype='auto' and exact_convolutions=False"):
        fastdiff.accelerate(network, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="accelerated already, in part"):
        fastdiff.accelerate(nn.Sequential(network).eval())
    fastdiff.restore(network)
    with pytest.raises(ValueError, match="UNet is not accelerated"):
        fastdiff.refresh(network)


@torch.no_grad()
def test_a_forward_that_was_put_around_ours_since(network, inputs):
    """It stays, before and after restore, and what it calls is the layer."""
    conv = network.conv_in
    fastdiff.accelerate(network, dtype=torch.float32)
    plain = network(*inputs)
    ours = conv.forward
    conv.forward = theirs = lambda x: 2 * ours(x)
    got = network(*inputs)
    assert ("Conv2d", 1, "its forward was replaced since") in network_of(network).report().kept
    fastdiff.restore(network)
    assert conv.forward is theirs
    expected = network(*inputs)
    assert close(got, expected)
    assert not close(plain, expected, 1e-2)


@pytest.mark.parametrize("where", ["norm1", "conv2", "time_emb_proj", "nonlinearity"])
def test_hooks_that_a_block_would_pass_by(network, inputs, where):
    """Such a block stays as it was, and the hook runs; hooks elsewhere run as they did."""
    block, calls = network.mid_block.resnets[0], []
    hooks = [getattr(block, where), network.down_blocks[0], network]
    for module in hooks:
        module.register_forward_hook(lambda m, *_: calls.append(m))
    with torch.no_grad():
        before = network(*inputs)
        expected, calls[:] = list(calls), []
        report = fastdiff.accelerate(network, dtype=torch.float32)
        assert [row for row in report.networks[""].kept if "hooks" in row[2]] == [
            ("ResnetBlock", 1, "a layer in it has hooks")
        ]
        assert close(network(*inputs), before)
    assert calls == expected


def test_a_forward_of_its_own_is_kept(network, inputs):
    conv = network.conv_in
    mine = conv.__dict__["forward"] = lambda x: type(conv).forward(conv, x) + 1
    with torch.no_grad():
        before = network(*inputs)
        report = fastdiff.accelerate(network, dtype=torch.float32)
        assert ("Conv2d", 1, "its forward is not its class's") in report.networks[""].kept
        assert close(network(*inputs), before)
        fastdiff.restore(network)
    assert conv.forward is mine


def test_layers_that_would_not_gain_are_left_alone(layers_left_alone, monkeypatch):
    """Amid unknown code; not in a block that reads them, nor where another dtype was asked for."""
    for kind, rule in layers_left_alone.items():
        monkeypatch.setattr(kind, "no_gain_reason", rule)
    depthwise, small, large = nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3)
    network = nn.ModuleList([depthwise, small, large, nn.Linear(8, 8), nn.LayerNorm(8)]).eval()
    report = fastdiff.accelerate(network, dtype=torch.float32).networks[""]
    assert [(kind, count) for kind, count, _ in report.changed] == [("Conv2d", 1), ("ModuleList", 1)]
    assert sum(count for _, count, why in report.kept if why.startswith("left alone")) == 4
    fastdiff.restore(network)
    assert fastdiff.accelerate(network, dtype=torch.bfloat16).networks[""].kept == ()
    fastdiff.restore(network)
    with pytest.raises(ValueError, match="nothing in this Sequential is known to fastdiff and would be faster"):
        fastdiff.accelerate(nn.Sequential(nn.Linear(64, 64), nn.SiLU()).eval(), dtype=torch.float32)


@torch.no_grad()
def test_exact_convolutions(network, inputs, monkeypatch):
    """None is of transformed or summed weights; else those are that the kernel suits."""
    calls = []
    original = layers.bind_conv2d
    monkeypatch.setattr(layers, "bind_conv2d", lambda *a, **k: calls.append(k) or original(*a, **k))
    before = network(*inputs)
    fastdiff.accelerate(network, dtype=torch.float32)
    assert close(network(*inputs), before)
    assert any(k.get("upsample") for k in calls)
    assert not any(k.get("exact") for k in calls)
    fastdiff.restore(network)
    calls.clear()
    report = fastdiff.accelerate(network, dtype=torch.float32, exact_convolutions=True)
    assert "Upsample" not in {kind for kind, *_ in report.networks[""].changed}
    assert close(network(*inputs), before)
    assert calls
    assert all(k["exact"] for k in calls)
    assert not any(k.get("upsample") for k in calls)
    fastdiff.restore(network)
    with pytest.raises(TypeError, match="exact_convolutions must be a bool; got int"):
        fastdiff.accelerate(network, exact_convolutions=1)
