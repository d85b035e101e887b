"""``accelerate(batch_invariant=True)``: an image's bits in any batch, by what is given a whole batch, and refusals."""

import copy
import pickle

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("diffusers")
import diffusers
from networks import CIFAR10, SD15, SMALL, VAE, Usual, close, randomized, small

import fastdiff
from fastdiff.acceleration.network import Network, network_of

MOST = 13
BATCHES = (1, 2, 3, 4, 8, MOST)
QUICK = (3, 8)
# Operations of which each result is exact, or rounded once, from its own sample's numbers.
EXACT = {
    "add", "add_", "sub", "rsub", "mul", "div", "cat", "stack", "copy_", "clone", "_to_copy", "view", "_unsafe_view",
    "reshape", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "expand", "permute", "transpose",
    "t", "unsqueeze", "squeeze", "as_strided", "detach", "alias", "embedding", "empty", "empty_like", "empty_strided",
    "zeros", "ones", "full", "aminmax", "new_empty", "new_zeros", "lift_fresh", "resolve_conj",
}  # fmt: skip


class Wrapped(nn.Module):
    """Of which nothing is known: the tensors that it is given stand in a mapping, and a library multiplies them."""

    def __init__(self):
        super().__init__()
        self.inner, self.weight = Usual(), nn.Parameter(torch.randn(27, 27))

    def forward(self, x, given):
        return {"image": torch.softmax(self.inner(x) @ self.weight * given["scale"][:, None, None, None], -1), "n": 3}


def digits():
    network = fastdiff.models.digits().unet.requires_grad_(False)
    labels = torch.randint(0, 10, (MOST,))
    return network, lambda m, at: m(IMAGES[1, 8, 8][at], TIMES[at], labels[at])


def cifar10():
    network = randomized(diffusers.UNet2DModel(**CIFAR10))
    return network, lambda m, at: m(IMAGES[3, 32, 32][at], TIMES[at]).sample


def unet():
    network = randomized(diffusers.UNet2DModel(**SMALL))
    return network, lambda m, at: m(IMAGES[3, 16, 16][at], TIMES[at]).sample


def sd(size=8):
    network = randomized(diffusers.UNet2DConditionModel(**SD15 | {"block_out_channels": (16, 32, 64, 64)}))
    prompt = torch.randn(MOST, 77, 96)
    return network, lambda m, at: m(IMAGES[4, size, size][at], TIMES[at], prompt[at]).sample


def sdxl():
    config = SD15 | {
        "block_out_channels": (16, 32), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8 * 6 + 24,
        "use_linear_projection": True, "transformer_layers_per_block": 1,
    }  # fmt: skip
    network = randomized(diffusers.UNet2DConditionModel(**config))
    prompt, pooled, ids = torch.randn(MOST, 77, 96), torch.randn(MOST, 24), torch.rand(MOST, 6) * 512

    def call(m, at):
        more = {"text_embeds": pooled[at], "time_ids": ids[at]}
        return m(IMAGES[4, 8, 8][at], TIMES[at], prompt[at], added_cond_kwargs=more).sample

    return network, call


def encoder():
    network = randomized(diffusers.AutoencoderKL(**VAE))
    return network, lambda m, at: m._encode(IMAGES[3, 16, 16][at])  # the posterior's parameters


def decoder():
    network = randomized(diffusers.AutoencoderKL(**VAE))
    return network, lambda m, at: m.decode(IMAGES[4, 8, 8][at]).sample


def unknown():
    scale = torch.rand(MOST)
    return randomized(Wrapped()), lambda m, at: m(IMAGES[3, 31, 27][at], {"scale": scale[at]})["image"]


CASES = [digits, unet, sd, sdxl, encoder, decoder, unknown]
IMAGES, TIMES = {}, torch.empty(0)


@pytest.fixture(autouse=True)
def inputs(seed):
    global TIMES
    TIMES = torch.randint(0, 1000, (MOST,))
    for shape in ((1, 8, 8), (3, 16, 16), (3, 32, 32), (4, 8, 8), (4, 64, 64), (3, 31, 27)):
        IMAGES[shape] = torch.randn(MOST, *shape)


LARGER = [
    pytest.param(dtype, threads, BATCHES, marks=pytest.mark.slow)
    for dtype in (torch.float32, torch.bfloat16)
    for threads in (1, 2)
]
HOW = [(torch.float32, 1, QUICK), *LARGER]


@pytest.fixture
def on():
    """Call with a number of threads, for the test's while."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def check(network, call, rng, batches=QUICK):
    """The images of windows of these sizes, anywhere, beside the same images each by itself."""
    most = max(batches)
    each = torch.cat([call(network, slice(i, i + 1)) for i in range(most)])
    for batch in batches:
        begin = rng.randint(0, most - batch)
        at = slice(begin, begin + batch)
        assert torch.equal(call(network, at), each[at]), at
    return each


@pytest.mark.parametrize(("dtype", "threads", "batches"), HOW)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_same_bits_in_every_batch(case, dtype, threads, batches, on, rng):
    on(threads)
    network, call = case()
    own = call(network, slice(0, 2))
    fastdiff.accelerate(network, dtype=dtype, batch_invariant=True)
    got = check(network, call, rng, batches)
    assert close(got[:2], own, 1e-5 if dtype == torch.float32 else 0.1)


# A CPU that does not know bfloat16 needs seconds an image in it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "threads", "batches"),
    [(torch.float32, 1, BATCHES), (torch.float32, 2, BATCHES), (torch.bfloat16, 1, (2, 3))],
)
@pytest.mark.parametrize("case", [cifar10, lambda: sd(64)], ids=["cifar10", "sd64"])
@torch.no_grad()
def test_the_same_bits_of_larger_networks(case, dtype, threads, batches, on, rng):
    on(threads)
    network, call = case()
    fastdiff.accelerate(network, dtype=dtype, batch_invariant=True)
    check(network, call, rng, batches)


@pytest.mark.slow
@torch.no_grad()
def test_every_vector_width(simd, rng):
    """With the kernels of each instruction set that this CPU has."""
    network, call = unet()
    fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=True)
    check(network, call, rng)


# ---- not by luck: what is given a whole batch


class Watch(TorchDispatchMode):
    """The operations that see a tensor of so many samples."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.seen = batch, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.ndim and t.shape[0] == self.batch for t in tensors):
            self.seen.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_no_library_sees_two_samples(case, monkeypatch):
    """Of torch's operations only those that round once are given the whole batch, whose size no weight has."""
    monkeypatch.setattr(Network, "unsuitable", lambda *args: False)  # the watch itself
    found = {}
    for invariant in (False, True):
        network, call = case()
        fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=invariant)
        with Watch(7) as watch:
            call(network, slice(3, 10))
        found[invariant] = watch.seen - EXACT
    assert found[True] == set()
    assert found[False] != set()  # what the promise costs is there to be seen


@torch.no_grad()
def test_what_the_report_says():
    network, _ = sd()
    told = str(fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=True))
    assert "the same bits of an image in every batch:" in told
    assert "Transformer2DModel    its own code; sample by sample" in told
    assert "library's convolutions sample by sample" in told
    told = str(fastdiff.accelerate(randomized(Wrapped()), dtype=torch.float32, batch_invariant=True))
    assert "called sample by sample, since the code of a Wrapped in it is not known" in told


# ---- with what changes a network


def hook(network):
    network.mid_block.register_forward_hook(lambda module, args, out: torch.softmax(out, 1))


def inner_hook(network):
    """On the last layer of a block: what changes an earlier one, the norm that follows takes back for the most part."""
    network.mid_block.resnets[0].conv2.register_forward_hook(lambda module, args, out: 10 * torch.softmax(out, 1))


def adapter(network):
    """As a LoRA's layer stands around a convolution's."""

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.down = base, nn.Conv2d(base.in_channels, base.out_channels, 3, padding=1)

        def forward(self, x):
            return self.base_layer(x) + self.down(x)

    for resnet in (network.down_blocks[0].resnets[0], network.mid_block.resnets[1]):
        resnet.conv1 = Lora(resnet.conv1).eval()
    network.conv_in = Lora(network.conv_in).eval()


def free(network):
    """FreeU filters by a Fourier transform in the up blocks' own code."""
    for block in network.up_blocks:
        for name, value in (("s1", 0.9), ("s2", 0.2), ("b1", 1.4), ("b2", 1.6)):
            setattr(block, name, value)


def processor(network):
    class Odd(diffusers.models.attention_processor.AttnProcessor):
        def __call__(self, *args, **kwargs):
            return 1.5 * super().__call__(*args, **kwargs)

    network.set_attn_processor(Odd())


def weights(network):
    for p in network.parameters():
        p.mul_(1.1)


SLOW_CHANGES = [pytest.param(change, marks=pytest.mark.slow) for change in (inner_hook, free, processor, weights)]


@pytest.mark.parametrize("change", [hook, adapter, *SLOW_CHANGES])
@torch.no_grad()
def test_after_a_change(change, rng):
    network, call = sd()
    fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=True)
    before = call(network, slice(0, 2))
    change(network)
    after = check(network, call, rng)
    assert not close(after[:2], before, 1e-4)
    if change is hook:
        assert "since a UNetMidBlock2DCrossAttn in it has hooks" in str(network_of(network).report())
    fastdiff.restore(network)
    assert close(after, call(network, slice(0, len(after))))


@torch.no_grad()
def test_a_copy_and_what_was_pickled(rng):
    network, call = unet()
    fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=True)
    right = call(network, slice(0, 3))
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert_same_bits(check(other, call, rng)[:3], right)


@torch.no_grad()
def test_restored_to_the_bit():
    network, call = unet()
    before, state = call(network, slice(0, 3)), dict(network.__dict__)
    fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=True)
    call(network, slice(0, 3))
    fastdiff.refresh(network)
    fastdiff.restore(network)
    assert_same_bits(call(network, slice(0, 3)), before)
    assert network.__dict__.keys() == state.keys()
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_gradients_of_its_own_code(rng):
    """With gradients recorded the network's own code runs, sample by sample."""
    network, call = unet()
    network.requires_grad_(True)
    fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=True)
    check(network, call, rng)
    call(network, slice(0, 3)).sum().backward()
    gradient = network.conv_in.weight.grad.clone()
    fastdiff.restore(network)
    network.zero_grad()
    call(network, slice(0, 3)).sum().backward()
    assert close(gradient, network.conv_in.weight.grad, 1e-4)


@torch.no_grad()
def test_under_autocast(rng):
    network, call = unet()
    fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=True)
    with torch.autocast("cpu", torch.bfloat16):
        check(network, call, rng)


@torch.no_grad()
def test_without_our_kernels(monkeypatch, rng):
    monkeypatch.setenv("FASTDIFF_BACKEND", "reference")
    network, call = unet()
    fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=True)
    check(network, call, rng)
    assert "sample by sample, since FASTDIFF_BACKEND" in str(network_of(network).report())


@torch.no_grad()
def test_one_entry_for_all_and_an_empty_batch():
    network, _ = sd()
    fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=True)
    x, prompt = IMAGES[4, 8, 8][:3], torch.randn(1, 77, 96)
    same = network(x, 7, prompt.expand(3, -1, -1)).sample
    assert torch.equal(network(x, torch.tensor(7), encoder_hidden_states=prompt.repeat(3, 1, 1)).sample, same)
    assert network(x[:0], 7, prompt[:0]).sample.shape == (0, 4, 8, 8)


# ---- what is refused


def test_arguments():
    network, _ = unet()
    with pytest.raises(TypeError, match="batch_invariant must be a bool; got str"):
        fastdiff.accelerate(network, batch_invariant="yes")
    report = fastdiff.accelerate(network, batch_invariant=True)
    assert fastdiff.accelerate(network, batch_invariant=True) is report
    with pytest.raises(ValueError, match=r"accelerated already, .* and batch_invariant=True; restore it first"):
        fastdiff.accelerate(network)


@torch.no_grad()
def test_tensors_that_are_not_one_a_sample():
    network, call = unknown()
    fastdiff.accelerate(network, batch_invariant=True)
    with pytest.raises(ValueError, match=r"Wrapped sample by sample: tensors must have 4 entries, .* got \[3\]"):
        network(IMAGES[3, 31, 27][:4], {"scale": torch.rand(3)})
    call(network, slice(0, 2))  # the network is none the worse for it


class Returns(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result(x)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (lambda x: x.mean(), "returned a tensor without dimensions"),
        (lambda x: {"y": object()}, "returned object"),
        (lambda x: float(x.sum()), "returned other values for other samples"),
    ],
)
@torch.no_grad()
def test_results_that_are_not_of_samples(result, told):
    network = Returns(result).eval()
    fastdiff.accelerate(network, batch_invariant=True)
    with pytest.raises(ValueError, match=told):
        network(IMAGES[3, 16, 16][:2])


@torch.no_grad()
def test_networks_that_it_cannot_be_promised_of():
    normed = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match=r"of this Sequential: 1 is a BatchNorm2d without running statistics"):
        fastdiff.accelerate(normed, batch_invariant=True)
    network, call = unet()
    handle = network.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match="the hooks of its UNet2DModel see the whole batch"):
        fastdiff.accelerate(network, batch_invariant=True)
    assert not any("forward" in module.__dict__ for m in (normed, network) for module in m.modules())
    handle.remove()
    fastdiff.accelerate(network, batch_invariant=True)
    handle = network.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(RuntimeError, match="the hooks of its UNet2DModel see the whole batch"):
        call(network, slice(0, 2))
    handle.remove()
    call(network, slice(0, 2))
    with pytest.raises(RuntimeError, match="no replicas"):
        nn.parallel.replicate(network, [0]) if torch.cuda.is_available() else network._replicate_for_data_parallel()


@torch.no_grad()
def test_modes_that_compute_a_batch_at_once():
    network, call = unet()
    fastdiff.accelerate(network, batch_invariant=True)
    network.train()
    with pytest.raises(RuntimeError, match="it is in training mode"):
        call(network, slice(0, 2))
    network.eval()
    x, t = IMAGES[3, 16, 16][:2], TIMES[:2]
    with pytest.raises(RuntimeError, match="is not compiled, traced or transformed"):
        torch.func.vmap(lambda x, t: network(x[None], t[None]).sample)(x, t)
    with pytest.raises(RuntimeError, match="is not compiled, traced or transformed"):
        torch.jit.trace(lambda x: network(x, t).sample, x)


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile():
    ours = small()
    fastdiff.accelerate(ours, batch_invariant=True)
    with pytest.raises(Exception, match="is not compiled"):
        torch.compile(ours, backend="eager", fullgraph=True)(IMAGES[3, 16, 16][:2], TIMES[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_on_a_gpu(case, rng):
    network, call = case()
    fastdiff.accelerate(network.cuda(), batch_invariant=True)

    def moved(m, at):
        global TIMES
        IMAGES.update({shape: x.cuda() for shape, x in IMAGES.items()})
        TIMES = TIMES.cuda()
        with torch.device("cuda"):
            return call(m, at)

    check(network, moved, rng)
    with torch.backends.cudnn.flags(benchmark=True), pytest.raises(RuntimeError, match="benchmark"):
        moved(network, slice(0, 2))
