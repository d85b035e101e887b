"""Networks that people use × dtypes × what is done to them: right within the documented bound, or refused in words."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
from matrix import MAKERS, difference, exact, in_words, rounded

import fastdiff

pytestmark = pytest.mark.networks


def rms(y, true):
    return float((y.double() - true).square().mean().sqrt())


def judge(got, true, plain, half, dtype):
    """float32: 1e-5 of the largest number beside the network's own error; bfloat16: twice PyTorch's own RMS error."""
    assert got.dtype == plain.dtype, f"{got.dtype} where the network's own code gives {plain.dtype}"
    if dtype == torch.float32:
        error, own = difference(got, true), difference(plain, true)
        assert error <= 1e-5 + own, f"off by {error:.2e}, the network's own code by {own:.2e}"
    else:
        error, own = rms(got, true), rms(half, true)
        assert error <= 2 * own, f"RMS error {error:.2e}, PyTorch's in bfloat16 {own:.2e}"


def with_lora(network):
    """peft's, on every other Linear and convolution that it knows; nothing where it knows none, or is not here."""
    try:
        import peft
    except ImportError:
        return
    layers = {n: m for n, m in network.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    names = [n for n, m in layers.items() if getattr(m, "groups", 1) == 1]
    if names:
        config = peft.LoraConfig(r=4, target_modules=names[::2], init_lora_weights=False)
        peft.inject_adapter_in_model(config, network)
        network.eval().requires_grad_(False)


def with_ema(network):
    for p in network.parameters():
        if p.is_floating_point():
            p.data.mul_(1.0 + 0.1 * torch.rand(()))


def to_bfloat16_and_back(network):
    network.to(torch.bfloat16)
    network.to(torch.float32)


CHANGES = {
    "plain call": None,
    "keyword call": None,
    "after EMA": with_ema,
    "after .to": to_bfloat16_and_back,
    "after LoRA": with_lora,
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"], ids=str)
@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_right_or_refused(seed, name, dtype):
    """Each change comes to a network that is accelerated and was called, and all that are wrong are told."""
    try:
        case = MAKERS[name]()
    except ImportError as error:
        pytest.skip(f"not installed: {error.name or error}")
    pristine, first, wrong = case.network, case.call(), {}
    true, half = exact(case), rounded(case)
    for change, apply in CHANGES.items():
        keywords = change == "keyword call"
        fast = copy.deepcopy(pristine)
        try:
            used = fastdiff.accelerate(fast, dtype=dtype).networks[""].dtype
        except ValueError as error:
            if not in_words(error):
                raise
            assert torch.equal(case.call(fast), first), "a network that was refused is as it was"
            return
        try:
            case.call(fast)
            plain, at_present, at_present_half = first, true, half
            twin = case
            if apply is not None:
                twin = case._replace(network=copy.deepcopy(pristine))
                torch.manual_seed(11)
                apply(twin.network)
                try:
                    plain = twin.call()
                except Exception:  # a library's layers that do not serve this network's own calls
                    continue
                torch.manual_seed(11)
                apply(fast)
                at_present = exact(twin)
                at_present_half = half if used == torch.float32 else rounded(twin)
            for _ in range(2):
                judge(case.call(fast, keywords=keywords), at_present, plain, at_present_half, used)
            fastdiff.restore(fast)
            assert torch.equal(case.call(fast), plain), "after restore the bits are not the network's own"
        except Exception as error:
            wrong[change] = f"{type(error).__name__}: {error}"[:150]
    assert wrong == {}


def test_the_list_is_long():
    """Networks of at least five libraries beside diffusers."""
    assert len(MAKERS) >= 45
