"""Networks that are accelerated: what they notice, and what they compute once."""

import copy
import gc
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

pytest.importorskip("diffusers")
from networks import SD15, SHAPE, close, randomized, small

import fastdiff
from fastdiff.acceleration import attention
from fastdiff.acceleration.blocks import Resnet
from fastdiff.acceleration.module import StandIn, stand_in_of
from fastdiff.acceleration.network import network_of


@torch.no_grad()
def test_all_that_is_derived_is_found(network, inputs):
    """What a captured graph must keep alive: every packed weight of the network, wherever a stand-in holds it."""
    fastdiff.accelerate(network, dtype=torch.float32)
    network(*inputs)
    kept = network_of(network).kept_weights()
    calls = {id(call) for held in kept if isinstance(held, dict) for call in held.values()}
    mine = [s for s in gc.get_objects() if isinstance(s, StandIn) and s.network is network_of(network)]
    bound = [call for stand_in in mine for call in (*stand_in.bound.values(), *stand_in.packed.values())]
    assert len(bound) > 20
    assert all(id(call) in calls for call in bound)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from tensors_in(each)


@pytest.mark.parametrize("batches", [(1,), (2, 3)])
@torch.no_grad()
def test_what_is_packed_takes_no_more_than_the_parameters(batches):
    digits = fastdiff.models.digits().unet
    fastdiff.accelerate(digits, dtype=torch.float32)
    for n in batches:
        digits(torch.randn(n, 1, 8, 8), torch.full((n,), 500.0), class_labels=torch.zeros(n, dtype=torch.long))
    theirs = {p.data_ptr() for p in digits.parameters()}
    packed = [t for stand_in in network_of(digits).stand_ins.values() for t in tensors_in(stand_in.packed)]
    own = [t for t in packed if t.layout != torch.strided or t.data_ptr() not in theirs]
    assert 0 < sum(t.nbytes for t in own) <= sum(p.nbytes for p in digits.parameters())


# ---- what is noticed


def change_in_place(network):
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.1)


def load_state(network):
    network.load_state_dict({k: 0.9 * v for k, v in network.state_dict().items()})


def replace_parameters(network):
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach() * 0.8))


def swap_data(network):
    for p in network.parameters():
        p.data = p.data * 1.2


@pytest.mark.parametrize("change", [change_in_place, load_state, replace_parameters, swap_data])
@torch.no_grad()
def test_new_weights_are_seen(network, inputs, change):
    fastdiff.accelerate(network, dtype=torch.float32)
    before = network(*inputs)
    change(network)
    after = network(*inputs)
    fastdiff.restore(network)
    expected = network(*inputs)
    assert close(after, expected)
    assert not close(before, expected, 1e-2)


@torch.no_grad()
def test_layouts_in_turn_bind_nothing_again(network, seed, monkeypatch):
    """Calls are bound for each size of images once, though sizes alternate; the oldest of many are dropped."""
    kept, original = [], StandIn.keep
    monkeypatch.setattr(StandIn, "keep", lambda *a: kept.append(a[1]) or original(*a))
    fastdiff.accelerate(network, dtype=torch.float32)
    counts = []
    for batch in (1, 1, 3, 3, 1, 3):
        network(torch.randn(batch, *SHAPE[1:]), torch.tensor(5))
        counts.append(len(kept))
        kept.clear()
    assert counts[0] == counts[2] > 10
    assert counts[1] == counts[3] == counts[4] == counts[5] == 0
    for batch in range(1, 30):
        network(torch.randn(batch, 3, 8, 8), torch.tensor(5))
    assert all(len(s.bound) <= 16 for s in network_of(network).stand_ins.values())


def test_gradients_and_training(network, inputs):
    """Where gradients are recorded, and in training mode, it is the module itself that runs."""
    x, t = inputs
    expected = network(x.requires_grad_(), t)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    fastdiff.accelerate(network, dtype=torch.bfloat16)
    y = network(x, t)
    assert_same_bits(y, expected)
    assert_same_bits(torch.autograd.grad(y.square().sum(), x)[0], wanted)
    assert not network(x.detach(), t).requires_grad  # nothing asks for one: the fast path
    network.requires_grad_(True)
    assert network(x.detach(), t).requires_grad
    network.requires_grad_(False).train()
    with torch.no_grad():
        assert_same_bits(network(x, t), expected)


@pytest.mark.slow
@torch.no_grad()
def test_compile(network, inputs):
    """Before and after: a compiled module runs what it traced, which is the module's own code."""
    before = network(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    fastdiff.accelerate(compiled, dtype=torch.float32)
    assert "forward" in network.__dict__
    assert close(compiled(*inputs), before)
    assert fastdiff.accelerate(network, dtype=torch.float32) is fastdiff.accelerate(compiled, dtype=torch.float32)
    torch._dynamo.reset()
    assert close(torch.compile(network, backend="aot_eager", fullgraph=True)(*inputs), before)
    assert close(network(*inputs), before)
    fastdiff.restore(compiled)
    assert_same_bits(network(*inputs), before)


@torch.no_grad()
def test_copies_and_pickles_are_accelerated_and_independent(network, inputs):
    fastdiff.accelerate(network, dtype=torch.float32)
    expected = network(*inputs)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(network), torch.load(buffer, weights_only=False)):
        assert_same_bits(twin(*inputs), expected)
        twin.conv_in.weight.zero_()
        assert not close(twin(*inputs), expected, 1e-3)
        assert stand_in_of(twin.conv_in, StandIn).module is twin.conv_in
        fastdiff.restore(twin)
        assert_same_bits(network(*inputs), expected)


@torch.no_grad()
def test_threads(network, seed):
    """Calls at the same time, at other timesteps, do not see each other's embeddings."""
    fastdiff.accelerate(network, dtype=torch.float32)
    x = torch.randn(SHAPE)
    expected = [network(x, torch.full((2,), 100 * i)) for i in range(4)]
    wrong = []

    @torch.no_grad()
    def work(i):
        for _ in range(10):
            if not close(network(x, torch.full((2,), 100 * i)), expected[i]):
                wrong.append(i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what they raise
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes_in_and_out(network, inputs, dtype):
    """The result has the input's dtype, whatever the arithmetic's; a half network keeps its own under "auto"."""
    x, t = inputs
    before = network(x, t)
    fastdiff.accelerate(network, dtype=dtype)
    y = network(x, t)
    assert y.dtype == torch.float32
    assert close(y, before, 1e-5 if dtype == torch.float32 else 0.05)
    fastdiff.restore(network)
    if dtype != torch.float32:
        network.to(dtype)
        assert fastdiff.accelerate(network).networks[""].dtype == dtype
        y = network(x.to(dtype), t)
        assert y.dtype == dtype
        assert close(y.float(), before, 0.05)


@torch.no_grad()
def test_odd_calls(network, inputs):
    """Batches of none, one and other sizes, other resolutions and memory formats, one after another."""
    pairs = []
    twin = copy.deepcopy(network)
    fastdiff.accelerate(network, dtype=torch.float32)
    for shape in ((2, 3, 16, 16), (1, 3, 16, 16), (5, 3, 8, 24), (0, 3, 16, 16), (2, 3, 16, 16)):
        x = torch.randn(shape)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=layout)
            pairs.append((network(x, 7), twin(x, 7)))
    for got, expected in pairs:
        assert got.shape == expected.shape
        assert got.numel() == 0 or close(got, expected)
    with torch.inference_mode():
        x, t = inputs
        assert close(network(x, t), twin(x, t))


# ---- once per sampling


@pytest.mark.parametrize("options", [{"steps": 5}, {"sampler": "ddim", "steps": 4}, {"sampler": "heun", "steps": 3}])
def test_a_plans_embeddings_are_computed_at_once(network, seed, options, monkeypatch):
    calls = []
    linear = network.time_embedding.linear_1
    expected = fastdiff.sample(network, SHAPE, seed=seed, **options)
    linear.register_forward_hook(lambda m, args, out: calls.append(args[0].shape))
    fastdiff.accelerate(network, dtype=torch.float32)
    images = fastdiff.sample(network, SHAPE, seed=seed, **options)
    assert len(calls) == 1  # [rows, D]
    assert close(images, expected, 1e-3)
    calls.clear()
    for state in fastdiff.sample_iter(network, SHAPE, seed=seed, **options):
        last = state.x
    assert len(calls) == 1
    assert_same_bits(last, images)


def test_no_table_where_the_embedding_holds_a_class(seed):
    """The class enters each sample's embedding: the table serves the timestep's part, and results agree."""
    network = small(num_class_embeds=4)
    options = {"steps": 4, "model_kwargs": {"class_labels": torch.tensor([1, 2])}, "seed": seed}
    expected = fastdiff.sample(network, SHAPE, **options)
    fastdiff.accelerate(network, dtype=torch.float32)
    assert close(fastdiff.sample(network, SHAPE, **options), expected, 1e-3)
    options |= {"uncond_kwargs": {"class_labels": torch.tensor([0, 0])}, "guidance_scale": 3.0}
    images = fastdiff.sample(network, SHAPE, **options)
    fastdiff.restore(network)
    assert close(images, fastdiff.sample(network, SHAPE, **options), 1e-3)


@torch.no_grad()
def test_a_prompts_keys_and_values_are_kept_while_it_is_the_same(seed, monkeypatch):
    import diffusers

    torch.manual_seed(seed)
    network = randomized(diffusers.UNet2DConditionModel(**(SD15 | {"block_out_channels": (16, 16, 32, 32)})))
    twin = copy.deepcopy(network)
    fastdiff.accelerate(network, dtype=torch.float32)
    cross = [m for m in network.modules() if getattr(m, "is_cross_attention", False)]
    projected, original = [], attention.bind_linear

    def watched(x, weight, bias, **more):
        call = original(x, weight, bias, **more)
        return (lambda x: projected.append(1) or call(x)) if x.shape[-1] == 96 else call

    monkeypatch.setattr(attention, "bind_linear", watched)
    x, prompt = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 96)
    for _ in range(3):
        assert close(network(x, 5, prompt).sample, twin(x, 5, prompt).sample)
    assert len(projected) == len(cross)
    prompt.mul_(0.5)  # the same tensor with other numbers
    assert close(network(x, 5, prompt).sample, twin(x, 5, prompt).sample)
    assert len(projected) == 2 * len(cross)
    for _ in range(3):  # new tensors, perhaps at the old one's place
        prompt = torch.randn(2, 77, 96)
        assert close(network(x, 5, prompt).sample, twin(x, 5, prompt).sample)
    mask = torch.ones(2, 77)
    mask[:, 40:] = 0
    got, expected = (m(x, 5, prompt, encoder_attention_mask=mask).sample for m in (network, twin))
    assert close(got, expected)


@torch.no_grad()
def test_switches_of_diffusers_that_are_turned_later(seed):
    """FreeU and other attention processors after accelerate: their own code runs."""
    import diffusers
    from diffusers.models.attention_processor import SlicedAttnProcessor

    torch.manual_seed(seed)
    network = randomized(diffusers.UNet2DConditionModel(**(SD15 | {"block_out_channels": (16, 16, 32, 32)})))
    twin = copy.deepcopy(network)
    fastdiff.accelerate(network, dtype=torch.float32)
    x, prompt = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 96)
    for m in (network, twin):
        m.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert close(network(x, 5, prompt).sample, twin(x, 5, prompt).sample)
    for m in (network, twin):
        m.disable_freeu()
        m.set_attn_processor(SlicedAttnProcessor(1))
    assert close(network(x, 5, prompt).sample, twin(x, 5, prompt).sample)


def test_a_block_alone_can_be_accelerated(network, seed):
    block = network.mid_block.resnets[0]
    x, temb = torch.randn(2, 64, 8, 8), torch.randn(2, 128)
    with torch.no_grad():
        expected = block(x, temb)
        fastdiff.accelerate(block, dtype=torch.float32)
        assert not isinstance(block.forward, Resnet)  # the way in, around it
        assert close(block(x, temb), expected)
    fastdiff.restore(block)
    assert "forward" not in block.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_inputs_that_the_layers_do_not_take(seed, dtype):
    """An integer image is not computed as if it were none; what has another width is refused in torch's own words."""
    network = nn.Sequential(nn.Conv2d(32, 32, 3), nn.GroupNorm(2, 32), nn.Flatten(2), nn.Linear(9, 20000)).eval()
    x = torch.randn(2, 32, 5, 5)
    fastdiff.accelerate(network, dtype=dtype)
    network(x)
    conv, norm, _, linear = network
    for layer, image in ((conv, x), (norm, x)):
        with pytest.raises((TypeError, RuntimeError), match=r"floating point|dtype|type"):
            layer(image.long())
    with pytest.raises((TypeError, RuntimeError), match=r"floating point|dtype"):
        linear(torch.ones(2, 9, dtype=torch.int64))
    for wrong, words in ((torch.randn(2, 8), "mat1 and mat2 shapes"), (torch.tensor(1.0), "at least 1D")):
        with pytest.raises(RuntimeError, match=words):
            linear(wrong)
    with pytest.raises((ValueError, RuntimeError), match="channels"):
        conv(x[:, :31])
    network(x)
