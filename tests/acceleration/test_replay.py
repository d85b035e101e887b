"""Calls that are written down and replayed: the same bits as the ordinary call's, and never of what has changed."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import fastdiff
from fastdiff.acceleration import replay
from fastdiff.acceleration.network import network_of

pytest.importorskip("diffusers")
from matrix import cross, decoder, difference, encoder, ours, pixels
from networks import small


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """The second call of a layout is written down, the third is compared, the fourth is replayed."""
    monkeypatch.setattr(replay, "AFTER", 1)
    monkeypatch.setattr(replay, "LONGEST", 60)  # the first call binds


def layouts(network):
    return list(network_of(network).replays.layouts.values())


def assert_replayed(network, number=1):
    assert [(layout.reason, layout.trusted) for layout in layouts(network)] == [(None, True)] * number


def ordinary(network, call):
    """The call without a replay."""
    replays = network_of(network).replays
    serves, replays.serves = replays.serves, False
    try:
        return call()
    finally:
        replays.serves = serves


def other(inputs):
    """Other numbers of the same layout."""
    return {
        name: torch.randn_like(v) if v.is_floating_point() else torch.randint_like(v, 0, 5)
        for name, v in inputs.items()
    }


def warmed(case, dtype=torch.float32, mode=torch.no_grad):
    """Its network, accelerated, and called until its calls are replayed."""
    fastdiff.accelerate(case.network, dtype=dtype)
    with mode():
        for _ in range(3):
            case.call()
    assert layouts(case.network)
    assert all(layout.trusted for layout in layouts(case.network))
    return case.network


MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
CASES = {f.__name__: f for f in (ours, pixels, cross, encoder, decoder)}


# ---- right


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    ("warm", "mode"),
    [
        ("no_grad", "inference_mode"),
        *(pytest.param("inference_mode", mode, marks=pytest.mark.slow) for mode in MODES),
    ],
)
@pytest.mark.parametrize("make", CASES.values(), ids=list(CASES))
def test_same_bits_of_other_numbers(seed, make, warm, mode, dtype):
    case = make()
    network = warmed(case, dtype, MODES[warm])
    called = [layout.function for layout in layouts(network)]
    for _ in range(3):
        again = case._replace(inputs=other(case.inputs))
        with MODES[mode]():
            got = again.call(network)
            want = ordinary(network, lambda: again.call(network))  # noqa: B023
        assert_same_bits(got, want)
        assert got.is_inference() == want.is_inference()
    assert called == [layout.function for layout in layouts(network)]


@torch.no_grad()
def test_a_replay_makes_no_call_of_the_networks_own_code(seed, monkeypatch):
    case = pixels()
    network = warmed(case)
    monkeypatch.setattr(replay.Layout, "replay", lambda self, tensors: "replayed")
    assert network(*case.inputs.values()) == "replayed"


@torch.no_grad()
def test_results_have_memory_of_their_own(seed):
    case = ours()
    network = warmed(case)
    first = network(**case.inputs)
    kept = first.clone()
    second = network(**other(case.inputs))
    assert first.data_ptr() != second.data_ptr()
    assert_same_bits(first, kept)


@torch.no_grad()
def test_layouts_are_apart_and_few(seed, monkeypatch):
    monkeypatch.setattr(replay, "LAYOUTS", 3)
    case = pixels()
    network = warmed(case)
    for batch in (1, 3, 4, 5):
        inputs = {"sample": torch.randn(batch, 3, 16, 16), "timestep": torch.tensor([7])}
        for _ in range(4):
            got = network(**inputs).sample
        assert_same_bits(got, ordinary(network, lambda: network(**inputs).sample))  # noqa: B023
    assert_replayed(network, 3)
    last = {"sample": torch.randn(5, 3, 16, 16).contiguous(memory_format=torch.channels_last), "timestep": 7}
    assert_same_bits(network(**last).sample, ordinary(network, lambda: network(**last).sample))


@torch.no_grad()
def test_the_form_of_the_result(seed):
    case = cross()
    network = warmed(case)
    for _ in range(4):
        as_tuple = network(*case.inputs.values(), return_dict=False)
    as_object = network(*case.inputs.values())
    assert type(as_tuple) is tuple
    assert type(as_object).__name__ == "UNet2DConditionOutput"
    assert_same_bits(as_tuple[0], as_object.sample)
    assert as_object["sample"] is as_object.sample
    assert "calls of 2 layouts replayed" in str(fastdiff.accelerate(network, dtype=torch.float32))
    assert_replayed(network, 2)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sampling(seed, sampler):
    network = small()
    fastdiff.accelerate(network, dtype=torch.float32)

    def sample():
        return fastdiff.sample(network, (2, 3, 16, 16), sampler=sampler, steps=12, seed=3)

    got = sample()
    assert_replayed(network)  # with the rows of the embedding that were planned
    assert_same_bits(got, ordinary(network, sample))


def test_threads(seed):
    case = cross()
    network = warmed(case)
    inputs = [other(case.inputs) for _ in range(4)]
    with torch.no_grad():
        want = [ordinary(network, lambda i=i: network(**i).sample) for i in inputs]
    fastdiff.refresh(network)
    got = [None] * 4

    @torch.no_grad()
    def run(i):
        for _ in range(6):
            got[i] = network(**inputs[i]).sample

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_replayed(network)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


@torch.no_grad()
def test_copies_have_their_own(seed):
    case = ours()
    network = warmed(case)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert layouts(twin) == []
        twin.conv_out.bias.add_(1)
        for _ in range(4):
            got = twin(**case.inputs)
        assert_replayed(twin)
        assert difference(got, network(**case.inputs) + 1) < 1e-5


@torch.no_grad()
def test_nothing_is_kept_of_what_is_dropped(seed):
    case = ours()
    network = warmed(case)
    function = weakref.ref(layouts(network)[0].function)
    packed = weakref.ref(next(iter(network_of(network).stand_ins[network.conv_in].bound.values())))
    gc.disable()
    try:
        fastdiff.restore(network)
        assert function() is None
        assert packed() is None
    finally:
        gc.enable()


# ---- what changes is seen


def larger(network):
    network.conv_out.weight.mul_(2)


def through_data(network):
    network.conv_out.weight.data.mul_(2)


def replaced_layer(network):
    conv = nn.Conv2d(network.conv_in.in_channels, network.conv_in.out_channels, 3, padding=1).eval()
    network.conv_in = conv.requires_grad_(False)


def hook(network):
    network.up_blocks[0].register_forward_hook(lambda module, args, out: 1.5 * out)


def own_forward(network):
    block = network.up_blocks[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def free_u(network):
    network.enable_freeu(0.9, 0.2, 1.2, 1.4)


def embedding(network):
    network.time_proj.downscale_freq_shift = 0.5  # an option of which the guard knows nothing


def rescaled(network):
    network.mid_block.resnets[0].output_scale_factor = 2.0


def training(network):
    network.train()
    network.eval()


CHANGES = (larger, through_data, replaced_layer, hook, own_forward, free_u, embedding, rescaled, training)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_is_seen(seed, change):
    torch.manual_seed(seed)
    case = cross()
    plain = copy.deepcopy(case.network)
    network = warmed(case)
    before = network(**case.inputs).sample
    for changed in (plain, network):
        torch.manual_seed(seed)
        change(changed)
    want = plain(**case.inputs).sample
    if change is not training:
        assert difference(want, before) > 1e-4, "this changes nothing, so it tests nothing"
    for _ in range(6):
        assert difference(network(**case.inputs).sample, want) < 1e-5


@torch.no_grad()
def test_side_effects_of_others_code_stay(seed):
    """A hook or a class's forward that someone replaced, with more to do than to compute."""
    from diffusers.models.unets.unet_2d_blocks import DownBlock2D

    case, seen = pixels(), []
    network = case.network
    fastdiff.accelerate(network, dtype=torch.float32)
    handle = network.mid_block.register_forward_hook(lambda *args: seen.append("hook"))
    for _ in range(6):
        network(**case.inputs)
    assert seen == ["hook"] * 6
    handle.remove()
    own, seen[:] = DownBlock2D.forward, []

    def forward(self, *args, **kwargs):
        seen.append("forward")
        return own(self, *args, **kwargs)

    forward.__module__, forward.__qualname__ = own.__module__, own.__qualname__  # as functools.wraps has it
    DownBlock2D.forward = forward
    try:
        for _ in range(6):
            network(**case.inputs)
    finally:
        DownBlock2D.forward = own
    assert len(seen) == 6
    for _ in range(4):
        network(**case.inputs)
    assert_replayed(network)


@torch.no_grad()
def test_an_attribute_that_always_changes(seed):
    case = pixels()
    network = warmed(case)
    for turn in range(6):
        network.mid_block.note = turn
        network(**case.inputs)
        assert [layout.calls for layout in layouts(network)] == [1]
    for _ in range(3):
        network(**case.inputs)
    assert_replayed(network)


@torch.no_grad()
def test_a_weight_of_one_number_is_replaced_by_an_equal_one(seed):
    network = small(in_channels=1, out_channels=1)
    fastdiff.accelerate(network, dtype=torch.float32)
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([5, 700])
    for _ in range(4):
        before = network(x, t)
    assert_replayed(network)
    network.conv_out.bias = nn.Parameter(network.conv_out.bias.clone(), requires_grad=False)
    network(x, t)
    network.conv_out.bias.data.add_(1)
    for _ in range(5):
        assert difference(network(x, t), before + 1) < 1e-5


@torch.no_grad()
def test_restored(seed):
    case = ours()
    plain = copy.deepcopy(case.network)
    network = warmed(case)
    network.conv_out.weight.mul_(2)
    plain.conv_out.weight.mul_(2)
    fastdiff.restore(network)
    assert_same_bits(network(**case.inputs), plain(**case.inputs))


def test_gradients_and_training_are_not_replayed(seed):
    case = ours()
    network = warmed(case)
    x = case.inputs["sample"].requires_grad_()
    network(x, case.inputs["timestep"], case.inputs["class_labels"]).sum().backward()
    assert float(x.grad.abs().max()) > 0


# ---- what is not replayed


@torch.no_grad()
def test_python_numbers_are_not(seed):
    case = ours()
    fastdiff.accelerate(case.network, dtype=torch.float32)
    for t in (5, 700, 0.5, 5):
        got = case.network(case.inputs["sample"], t, case.inputs["class_labels"])
        right = case.network(case.inputs["sample"], torch.full((2,), float(t)), case.inputs["class_labels"])
        assert_same_bits(got, right)
    assert len(layouts(case.network)) == 1


@torch.no_grad()
def test_one_tensor_given_twice_is_not(seed):
    case = cross()
    network = case.network
    fastdiff.accelerate(network, dtype=torch.float32)
    t = torch.randn(2)
    for _ in range(4):
        network(case.inputs["sample"], t, case.inputs["encoder_hidden_states"], timestep_cond=None, class_labels=t)
    assert layouts(network) == []


@torch.no_grad()
def test_long_calls_are_not(seed, monkeypatch):
    monkeypatch.setattr(replay, "LONGEST", 0.0)
    case = ours()
    fastdiff.accelerate(case.network, dtype=torch.float32)
    for _ in range(4):
        case.network(**case.inputs)
    assert [layout.reason for layout in layouts(case.network)] == ["its calls take long"]


@torch.no_grad()
def test_a_replay_that_differs_is_not_trusted(seed, monkeypatch):
    written = replay.Recording.function

    def doubled(self, results):
        function = written(self, results)
        return lambda *given: [2 * result for result in function(*given)]

    monkeypatch.setattr(replay.Recording, "function", doubled)
    case = ours()
    fastdiff.accelerate(case.network, dtype=torch.float32)
    outs = [case.network(**case.inputs) for _ in range(5)]
    assert [layout.reason for layout in layouts(case.network)] == ["a replay differed from the call"]
    for out in outs:
        assert_same_bits(out, outs[0])


@torch.no_grad()
def test_a_replay_that_fails_is_given_up(seed):
    case = ours()
    network = warmed(case)
    layout, want = layouts(network)[0], network(*case.inputs.values())

    def failing(*given):
        raise RuntimeError("no memory")

    layout.function = failing
    for _ in range(2):
        assert_same_bits(network(*case.inputs.values()), want)
    assert (layout.trusted, layout.reason) == (False, "a replay failed: no memory")


@pytest.mark.parametrize(
    ("ours", "right", "same"), [(0.0, -0.0, False), (0.0, 0.0, True), (float("nan"), float("nan"), True)]
)
def test_what_the_same_bits_are(ours, right, same):
    for shape in ((), (2, 3, 4, 5)):
        a, b = torch.full(shape, ours), torch.full(shape, right)
        assert replay._same(a, b) is same
    last = torch.full((2, 3, 4, 5), ours).contiguous(memory_format=torch.channels_last)
    assert not replay._same(torch.full((2, 3, 4, 5), ours), last)


@torch.no_grad()
def test_a_call_that_fails_while_it_is_written_down(seed, monkeypatch):
    case = pixels()
    network = case.network
    fastdiff.accelerate(network, dtype=torch.float32)
    want = network(**case.inputs).sample
    call, interrupt = replay.Recording.call, True

    def interrupted(self, *args):
        if interrupt:
            raise KeyboardInterrupt
        return call(self, *args)

    monkeypatch.setattr(replay.Recording, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        network(**case.inputs)
    interrupt = False
    for _ in range(4):
        assert_same_bits(network(**case.inputs).sample, want)
    assert_replayed(network)


@torch.no_grad()
def test_errors_are_said_in_words(seed):
    case = ours()
    network = warmed(case)
    x, t = case.inputs["sample"], case.inputs["timestep"]
    for labels in ([1, 5], [-1, 0]):
        with pytest.raises(ValueError, match=rf"class_labels range from {min(labels)} to {max(labels)}"):
            network(x, t, torch.tensor(labels))
    assert_replayed(network)
    for _ in range(4):
        with pytest.raises(ValueError, match="sample has shape"):
            network(torch.randn(2, 4, 16, 16), t, case.inputs["class_labels"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (lambda x: x * float(x.sum()), "float"),
        (lambda x: x[x > 0].sum() * x, "tells Python"),
        (lambda x: x + torch.tensor([1.0]), "came from elsewhere"),
        (lambda x: x.add_(1), "may write to what it was given"),
        (lambda x: x[:1].mul_(2), "may write to what it was given"),
        (lambda x: x * torch.rand(3, generator=torch.Generator().manual_seed(1)), "draws random numbers"),
        (lambda x: x if torch.equal(x, x) else -x, "bool"),
    ],
)
def test_what_is_no_function_of_its_tensors(lines, reason):
    x = torch.arange(3.0)
    recording = replay.Recording([x], [])
    with recording:
        lines(x)
    assert recording.reason is not None
    assert reason in recording.reason


@torch.no_grad()
def test_lines(seed):
    """Sequences, keywords, writes to what was made, constants, and results that are given or appear twice."""
    weight = torch.randn(4, 4)

    def lines(x, y):
        a, b = torch.linalg.qr(x @ weight)
        c = torch.cat([a, b, y], dim=1)
        first, second = c.split([3, 9], dim=-1)
        first.mul_(2)  # second is of c, too
        return [c.clone(memory_format=torch.contiguous_format), second, y, second, None]

    x, y = torch.randn(4, 4), torch.randn(4, 4)
    recording = replay.Recording([x, y], [weight])
    with recording:
        results = lines(x, y)
    function = recording.function(results)
    assert recording.reason is None
    for _ in range(2):
        x, y = torch.randn(4, 4), torch.randn(4, 4)
        for got, want in zip(function(x, y), lines(x, y), strict=True):
            assert got is want if want is None else torch.equal(got, want)
