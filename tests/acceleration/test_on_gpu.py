"""The fast path on a GPU: the same function, and captured as a graph the bits of its eager steps."""

import copy
import threading

import pytest
import torch
from helpers import assert_same_bits

pytest.importorskip("diffusers")
from networks import CASES, oracle, small

import fastdiff
from fastdiff.sampling import graph

pytestmark = pytest.mark.gpu
SHAPE = (4, 3, 16, 16)


@pytest.fixture(autouse=True)
def on_the_gpu(seed):
    with torch.device("cuda"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.no_grad():
        yield


def rms(y, exact):
    return float((y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("name", CASES)
def test_same_function(name):
    """Float32 within 1e-5; bfloat16 with at most 1.5 times PyTorch's own RMS error."""
    case = CASES[name]()
    case.network.cuda()
    exact, eager = oracle(case), case.call(case.network, torch.float32)
    half = case.call(copy.deepcopy(case.network).bfloat16(), torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        fastdiff.accelerate(case.network, dtype=dtype)
        y = case.call(case.network, torch.float32)
        fastdiff.restore(case.network)
        if dtype == torch.float32:
            assert float((y - eager).abs().max() / eager.abs().max()) <= 1e-5
        else:
            print(f"rms error in bfloat16: {rms(y, exact):.2e}, PyTorch's {rms(half, exact):.2e}")
            assert rms(y, exact) <= 1.5 * rms(half, exact)
    assert_same_bits(case.call(case.network, torch.float32).cpu(), eager.cpu())


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def network(request):
    model = small().cuda()
    fastdiff.accelerate(model, dtype=request.param)
    return model


def sampled(model, **options):
    return fastdiff.sample(model, SHAPE, steps=7, clip=1.0, **options).cpu()


def test_captured_is_eager_to_the_bit(network):
    for seed in range(3):
        eager = sampled(network, seed=seed, cuda_graph=False)
        assert_same_bits(sampled(network, seed=seed, cuda_graph=True), eager)
    assert len(graph._graphs[network]) == 1
    assert_same_bits(sampled(network, seed=2, sampler="ddim", cuda_graph=True),
                     sampled(network, seed=2, sampler="ddim", cuda_graph=False))  # fmt: skip


def test_weights_that_change_are_seen(network):
    before = sampled(network, cuda_graph=True)
    network.mid_block.resnets[0].conv1.weight.mul_(1.5)
    after = sampled(network, cuda_graph=True)
    assert not torch.equal(before, after)
    assert_same_bits(after, sampled(network, cuda_graph=False))
    fastdiff.restore(network)
    assert_same_bits(sampled(network, cuda_graph=True), sampled(network, cuda_graph=False))


def test_the_same_bits_twice(network):
    x, t = torch.randn(SHAPE), torch.randint(0, 1000, (4,))
    assert_same_bits(network(x, t).cpu(), network(x, t).cpu())


def test_accelerated_again(network):
    """A graph of stand-ins that are gone is not replayed, nor are its weights' addresses read."""
    dtype = network._fastdiff_accelerated.context.dtype
    first = sampled(network, cuda_graph=True)
    fastdiff.restore(network)
    assert network not in graph._graphs
    fastdiff.accelerate(network, dtype=dtype)
    assert_same_bits(sampled(network, cuda_graph=True), first)
    fastdiff.restore(network)
    fastdiff.accelerate(network, dtype=dtype, exact_convolutions=True)
    assert_same_bits(sampled(network, cuda_graph=True), sampled(network, cuda_graph=False))


def test_weights_that_come_back(network):
    """Two sets of weights in turn, as adapters swap them: each graph has its own packed copies."""
    conv = network.mid_block.resnets[0].conv1
    sets = [conv.weight, torch.nn.Parameter(conv.weight * 1.5, requires_grad=False)]
    expected = []
    for weight in sets:
        conv.weight = weight
        expected.append(sampled(network, cuda_graph=False))
    for _ in range(2):
        for weight, images in zip(sets, expected, strict=True):
            conv.weight = weight
            assert_same_bits(sampled(network, cuda_graph=True), images)


class Wrapper(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t, weight=None):
        out = self.network(x, t)
        return out if weight is None else out * weight


def test_a_wrapped_network(network):
    """A graph of what holds an accelerated network sees its weights change, and keeps what it reads."""
    model = Wrapper(network).eval()
    for _ in range(2):
        eager = sampled(model, cuda_graph=False)
        assert_same_bits(sampled(model, cuda_graph=True), eager)
        network.mid_block.resnets[0].conv1.weight.mul_(1.5)
    fastdiff.restore(network)
    torch.cuda.empty_cache()
    assert_same_bits(sampled(model, cuda_graph=True), sampled(model, cuda_graph=False))


def test_a_number_on_the_host(network):
    """A kernel takes it by value: another one is another graph."""
    model = Wrapper(network).eval()
    for weight in (1.0, 0.5):
        options = {"model_kwargs": {"weight": torch.tensor(weight, device="cpu")}}
        assert_same_bits(sampled(model, cuda_graph=True, **options), sampled(model, cuda_graph=False, **options))


def test_inference_mode(network):
    expected = sampled(network, cuda_graph=True)
    with torch.inference_mode():
        assert_same_bits(sampled(network, cuda_graph=True), expected)
    assert_same_bits(sampled(network, cuda_graph=True), expected)


def test_autocast():
    """Its copies of weights last for a block; a graph lasts longer, and belongs to one of its dtypes."""
    model = small().cuda().requires_grad_(True)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            graphed = sampled(model, cuda_graph=True)
        torch.cuda.empty_cache()
        torch.full((1 << 24,), float("nan"))  # what the copies lay in
        with torch.autocast("cuda", dtype=dtype):
            assert_same_bits(graphed, sampled(model, cuda_graph=False))
            assert_same_bits(sampled(model, cuda_graph=True), graphed)


class Synchronises(torch.nn.Module):
    def forward(self, x, t):
        return x * float(x.mean())


def test_after_a_capture_that_failed(network):
    """The next one succeeds, torch's generator draws, and its allocator still gives memory back."""
    with pytest.raises(RuntimeError, match="could not be captured"):
        fastdiff.sample(Synchronises().cuda(), SHAPE, steps=3, cuda_graph=True, device="cuda")
    torch.randn(4)
    torch.cuda.synchronize()
    block = torch.empty(1 << 28, dtype=torch.uint8)
    reserved = torch.cuda.memory_reserved()
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved
    assert_same_bits(sampled(network, cuda_graph=True), sampled(network, cuda_graph=False))


def test_two_threads_at_once(network):
    expected = [sampled(network, seed=k, cuda_graph=False) for k in range(2)]
    got = {}

    def work(k):
        with torch.device("cuda"), torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                got[k] = sampled(network, seed=k)

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for k in range(2):
        assert_same_bits(got[k], expected[k])
