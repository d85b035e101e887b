"""Networks that people use × dtypes × what is done to them: right within the documented bound, or refused in words."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
from matrix import MAKERS, Case, difference, exact, in_words, rounded

import fastdiff

pytestmark = pytest.mark.slow


def rms(y, true):
    return float((y.double() - true).square().mean().sqrt())


def judge(got, true, plain, half, dtype, what):
    """float32: 1e-5 of the largest number beside the network's own error; bfloat16: twice PyTorch's own RMS error."""
    assert got.dtype == plain.dtype, f"{what}: {got.dtype} where the network's own code gives {plain.dtype}"
    if dtype == torch.float32:
        error, own = difference(got, true), difference(plain, true)
        assert error <= 1e-5 + own, f"{what}: off by {error:.2e}, the network's own code by {own:.2e}"
    else:
        error, own = rms(got, true), rms(half, true)
        assert error <= 2 * own, f"{what}: RMS error {error:.2e}, PyTorch's in bfloat16 {own:.2e}"


def with_lora(network):
    """On every other Linear and convolution, where the library can put it."""
    peft = pytest.importorskip("peft")
    names = [
        n
        for n, m in network.named_modules()
        if type(m) in (nn.Linear, nn.Conv2d) and not getattr(m, "parametrizations", 0)
    ]
    names = [n for n in names if getattr(network.get_submodule(n), "groups", 1) == 1]
    if not names:
        pytest.skip("no layer of it takes a LoRA")
    config = peft.LoraConfig(r=4, target_modules=names[::2], init_lora_weights=False)
    peft.inject_adapter_in_model(config, network)
    network.eval().requires_grad_(False)


def with_ema(network):
    torch.manual_seed(5)
    for p in network.parameters():
        if p.is_floating_point():
            p.data.mul_(1.0 + 0.1 * torch.rand(()))


def to_bfloat16_and_back(network):
    network.to(torch.bfloat16)
    network.to(torch.float32)


CHANGES = {
    "plain call": None,
    "keyword call": None,
    "after LoRA": with_lora,
    "after EMA": with_ema,
    "after .to": to_bfloat16_and_back,
    "after restore": None,
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"], ids=str)
@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_right_or_refused(seed, name, dtype, change):
    try:
        case: Case = MAKERS[name]()
    except ImportError as error:
        pytest.skip(f"not installed: {error.name or error}")
    keywords = change == "keyword call"
    fast = copy.deepcopy(case.network)
    first = case.call()
    try:
        report = fastdiff.accelerate(fast, dtype=dtype)
    except ValueError as error:
        if not in_words(error):
            raise
        got = case.call(fast, keywords=keywords)
        assert torch.equal(got, first), "a network that was refused is as it was"
        return
    used = report.networks[""].dtype
    case.call(fast, keywords=keywords)
    plain = case.network
    if CHANGES[change] is not None:
        for network in (plain, fast):
            torch.manual_seed(11)
            CHANGES[change](network)
    if change == "after restore":
        fastdiff.restore(fast)
        assert torch.equal(case.call(fast), first)
        assert not any(m.__dict__.get("forward") for m in fast.modules())
        return
    own = case.call(plain, keywords=keywords)
    true = exact(case)
    half = None if used == torch.float32 else rounded(case)
    for turn in range(2):
        judge(case.call(fast, keywords=keywords), true, own, half, used, f"{change}, call {turn}")


def test_the_list_is_long():
    """Networks of at least five libraries beside diffusers."""
    assert len(MAKERS) >= 45
