"""An accelerated network computes the same function: against float64, against PyTorch's own error, in each dtype."""

import sys

import pytest
import torch
from helpers import assert_same_bits

pytest.importorskip("diffusers")
from networks import CASES, halved, oracle

import fastdiff
from fastdiff.acceleration.module import StandIn
from fastdiff.ops.conv2d.winograd import pack

QUICK = ("scale_shift", "rescaled", "ours", "packaged", "usual")  # the others are networks of published sizes


def rms(y, exact):
    return float((y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.fixture
def pairs(monkeypatch):
    """bfloat16 is multiplied as on a CPU that can, whose rounding is the coarser."""
    monkeypatch.setattr(sys.modules[pack.__module__], "_pairs", lambda dtype: dtype == torch.bfloat16)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
@torch.no_grad()
def test_same_function(name, seed, pairs):
    """Float32 within 1e-5; bfloat16 with at most 1.5 times PyTorch's own RMS error. Nothing is left behind."""
    case = CASES[name]()
    exact = oracle(case)
    assert exact.numel() >= 10_000
    eager = case.call(case.network, torch.float32)
    half = case.call(halved(case.network), torch.bfloat16)
    state = {key: value.clone() for key, value in case.network.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16):
        fastdiff.accelerate(case.network, dtype=dtype)
        for y in (case.call(case.network, torch.float32), case.call(case.network, torch.float32)):
            assert y.dtype == torch.float32
            if dtype == torch.float32:
                assert float((y - eager).abs().max() / eager.abs().max()) <= 1e-5
            else:
                print(f"rms error in bfloat16: {rms(y, exact):.2e}, PyTorch's {rms(half, exact):.2e}")
                assert rms(y, exact) <= 1.5 * rms(half, exact)
        fastdiff.restore(case.network)
        assert_same_bits(case.call(case.network, torch.float32), eager)
        assert not any("forward" in m.__dict__ or "_fastdiff_accelerated" in m.__dict__ for m in case.network.modules())
        for key, value in case.network.state_dict().items():
            assert_same_bits(value, state[key], key)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("celeba256", "packaged")])
@torch.no_grad()
def test_what_the_report_says_is_what_runs(name, seed, monkeypatch):
    """No stand-in that is in use falls back to its module's own code in an ordinary call."""
    case, fallen = CASES[name](), []
    monkeypatch.setattr(StandIn, "own", lambda self, args, kwargs: fallen.append(type(self.module).__name__))
    fastdiff.accelerate(case.network, dtype=torch.float32)
    case.call(case.network, torch.float32)
    assert fallen == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "decoder"])
@torch.no_grad()
def test_a_network_of_bfloat16(name, seed, pairs):
    """Its weights have no error of their own that would hide the arithmetic's."""
    case = CASES[name]()
    case.network.bfloat16()
    exact, half = oracle(case), case.call(halved(case.network), torch.bfloat16)
    fastdiff.accelerate(case.network)
    y = case.call(case.network, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    print(f"rms error in bfloat16: {rms(y, exact):.2e}, PyTorch's {rms(half, exact):.2e}")
    assert rms(y, exact) <= 1.5 * rms(half, exact)


@pytest.mark.parametrize("steps", [50, pytest.param(1000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_whole_samplings(steps, seed):
    """The packaged model's images, in float32 within 1e-3 of the unaccelerated ones."""
    trained = fastdiff.models.digits()
    count = 10 if steps == 50 else 2
    arguments = trained.arguments(torch.arange(count), sampler="ddim" if steps == 50 else "ddpm", steps=steps)

    def images():
        return fastdiff.sample(trained.unet, (count, 1, 8, 8), seed=seed, **arguments)

    before = images()
    fastdiff.accelerate(trained.unet, dtype=torch.float32)
    assert float((images() - before).abs().max()) <= 1e-3
    fastdiff.restore(trained.unet)


@pytest.mark.slow
@torch.no_grad()
def test_quality_in_bfloat16(seed):
    """As many digits are recognised as from the unaccelerated model, within what 300 images can tell."""
    from fastdiff.training.data import load_digits

    trained = fastdiff.models.digits()
    labels = torch.arange(300) % 10
    train = load_digits("train")

    def recognised():
        samples = fastdiff.sample(trained.unet, (300, 1, 8, 8), seed=seed, **trained.arguments(labels, steps=20))
        nearest = torch.cdist(samples.flatten(1), train.images().flatten(1)).argmin(1)
        return int((train.labels[nearest] == labels).sum())

    before = recognised()
    fastdiff.accelerate(trained.unet, dtype=torch.bfloat16)
    after = recognised()
    print(f"of 300 digits, {before} are recognised in float32 and {after} in bfloat16")
    assert after >= before - 25  # three standard deviations of the difference at 80 % recognised
