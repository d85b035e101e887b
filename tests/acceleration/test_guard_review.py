"""Changes that leave modules, hooks and weights alone: methods, processors, scales, dropout; and mixed dtypes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("diffusers")
from diffusers.models import attention_processor as processors
from diffusers.models.resnet import ResnetBlock2D
from matrix import TOLERANCE, assert_equal, cross, difference, pixels

import fastdiff


def resnet(network):
    return network.down_blocks[0].resnets[0]


def attentions(network):
    return [m for m in network.modules() if isinstance(m, processors.Attention)]


def circular(network):
    """The usual way to images that can be tiled in one direction."""
    conv = resnet(network).conv1
    conv._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 0, 0), mode="circular"), w, b, padding=(1, 0))


def hidden_forward(network):
    conv = resnet(network).conv2
    conv.register_forward_hook(lambda m, args, out: 1.5 * out)


def plain_processor(network):
    network.set_attn_processor(processors.AttnProcessor())


def scale(network):
    plain_processor(network)
    for m in attentions(network):
        m.scale = 3 * m.scale


def namesake(network):
    class AttnProcessor2_0(processors.AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return 1.5 * super().__call__(*args, **kwargs)

    network.set_attn_processor(AttnProcessor2_0())


CHANGES = [circular, hidden_forward, plain_processor, scale, namesake]
WHEN = pytest.mark.parametrize("when", ["before", "before the first call", "between two calls"])


@WHEN
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change(seed, when, change):
    case = cross()
    plain, fast = case.network, copy.deepcopy(case.network)
    change(plain)
    if when == "before":
        change(fast)
    fastdiff.accelerate(fast, dtype=torch.float32)
    if when == "between two calls":
        case.call(fast)
    if when != "before":
        change(fast)
    got, want = case.call(fast), case.call(plain)
    # Steeper attention amplifies float32's rounding: the network's own may then err by more than the usual bound.
    right = case.call(copy.deepcopy(plain).double(), torch.float64)
    assert difference(got.double(), right) <= max(TOLERANCE, 2 * difference(want.double(), right))


@WHEN
@torch.no_grad()
def test_the_forward_of_a_class(seed, when, monkeypatch):
    case = cross()
    fast = copy.deepcopy(case.network)
    own = ResnetBlock2D.forward

    def change():
        monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, *args, **kwargs: 1.5 * own(self, *args, **kwargs))

    if when == "before":
        change()
    fastdiff.accelerate(fast, dtype=torch.float32)
    if when == "between two calls":
        case.call(fast)
    if when != "before":
        change()
    assert_equal(case.call(fast), case.call(case.network))
    monkeypatch.undo()
    assert_equal(case.call(fast), case.call(case.network))
    if when == "before":
        return
    assert "ResnetBlock2D" in {kind for kind, *_ in fastdiff.accelerate(fast, dtype=torch.float32).networks[""].changed}


@torch.no_grad()
def test_dropout_that_is_trained_and_set_later(seed):
    case = cross()
    plain, fast = case.network, copy.deepcopy(case.network)
    resnet(fast).dropout.train()
    fastdiff.accelerate(fast, dtype=torch.float32)
    case.call(fast)
    for m in (plain, fast):
        resnet(m).dropout.train()
        resnet(m).dropout.p = 1.0
    assert_equal(case.call(fast), case.call(plain))


@torch.no_grad()
def test_a_convolution_called_by_itself_after_its_block(seed):
    """The block adds its shortcut's bias with the second convolution's: that sum is not the convolution's own."""
    case = cross()
    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    case.call(fast)
    pairs = zip(plain.modules(), fast.modules(), strict=True)
    blocks = [(a, b) for a, b in pairs if isinstance(a, ResnetBlock2D) and a.conv_shortcut is not None]
    assert blocks
    for a, b in blocks:
        h = torch.randn(2, a.conv2.in_channels, 8, 8)
        assert_equal(b.conv2(h), a.conv2(h))
    assert_equal(case.call(fast), case.call(plain))


@torch.no_grad()
def test_a_network_of_which_a_block_is_its_own_code_in_bfloat16(seed):
    """Its last GroupNorm's result is cast back, and the SiLU after it, which is done already, is not done again."""
    case = cross()
    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.bfloat16)
    resnet(fast).conv2.register_forward_hook(lambda *args: None)
    assert_equal(case.call(fast), case.call(plain), tolerance=0.05)


@torch.no_grad()
def test_a_block_called_by_itself(seed):
    case = cross()
    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.bfloat16)
    x = torch.randn(2, plain.conv_in.in_channels, 8, 8)
    assert_equal(fast.conv_in(x), plain.conv_in(x), tolerance=0.03)


@torch.no_grad()
def test_a_network_that_changes_in_the_midst_of_a_sampling(seed):
    """The embeddings of the plan belong to the weights, and to the blocks, that there were when it began."""
    case = pixels()

    def run(network):
        steps = fastdiff.sample_iter(network, (2, 3, 16, 16), sampler="ddim", steps=4, seed=seed)
        last = None
        for row, last in enumerate(steps):  # noqa: B007
            if row == 1:
                network.time_embedding.linear_1.weight.mul_(1.5)
                resnet(network).conv2.register_forward_hook(lambda m, args, out: 1.5 * out)
        return last.x

    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    assert_equal(run(fast), run(plain), tolerance=1e-4)


class Mixed(nn.Module):
    """A half-precision network of which one layer is kept wide, as diffusers keeps some."""

    def __init__(self):
        super().__init__()
        self.narrow, self.kept = nn.Linear(64, 64).bfloat16(), nn.Linear(64, 64)
        self.table = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)

    def forward(self, x):
        return self.kept(self.narrow(x.bfloat16()).float())


@torch.no_grad()
def test_layers_that_are_kept_in_float32(seed):
    network, x = Mixed().eval(), torch.randn(5, 64)
    want = network(x)
    assert "another dtype" in str(fastdiff.accelerate(network))
    assert_equal(network(x), want, tolerance=1e-6)


@torch.no_grad()
def test_an_image_without_a_batch(seed):
    plain = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3)}).eval()
    fast = copy.deepcopy(plain)
    fastdiff.accelerate(fast, dtype=torch.bfloat16)
    for shape in ((3, 8, 8), (1, 3, 8, 8)):
        x = torch.randn(shape)
        assert_equal(fast["conv"](x), plain["conv"](x), tolerance=0.03)
