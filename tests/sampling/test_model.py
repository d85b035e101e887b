"""The networks that sample takes: what they are given, what they may return, and what goes wrong."""

import gc
import math
import signal
import threading

import pytest
import torch
from helpers import assert_same_bits, half
from torch import nn

import fastdiff
from fastdiff.sampling.model import _held, eval_mode

SHAPE = (4, 3, 8, 8)


def test_a_tuple_or_an_object(seed):
    class Out:
        def __init__(self, sample):
            self.sample = sample

    plain = fastdiff.sample(half, SHAPE, steps=3)
    for wrap in (lambda o: (o, None), lambda o: (o,), Out):
        assert_same_bits(fastdiff.sample(lambda x, t, wrap=wrap: wrap(x * 0.5), SHAPE, steps=3), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_the_network_is_given(backend, seed, dtype, layout):
    class Network(nn.Conv2d):
        def forward(self, x, t):
            seen.append((x.dtype, x.is_contiguous(memory_format=layout), tuple(x.shape), t.dtype, tuple(t.tolist()),
                         torch.is_grad_enabled(), self.training))  # fmt: skip
            inputs.append(x.clone())
            return super().forward(x)

    seen, inputs = [], []
    model = Network(3, 3, 3, padding=1).to(dtype).to(memory_format=layout)
    states = list(fastdiff.sample_iter(model, SHAPE, sampler="ddim", steps=3, seed=seed, backend=backend))
    assert seen == [(dtype, True, SHAPE, torch.int64, (t,) * 4, False, False) for t in (666, 333, 0)]
    assert all(state.x.dtype == torch.float32 and state.x.is_contiguous() for state in states)
    # Each input is the float32 state, rounded once.
    assert_same_bits(inputs[0], fastdiff.randn(SHAPE, seed=seed).to(dtype))
    for x, state in zip(inputs, states, strict=False):
        assert_same_bits(x, state.x.to(dtype))
    assert model.training


def test_model_dtype_of_a_function():
    def model(x, t):
        assert x.dtype == torch.bfloat16
        return x.float() * 0.5  # an output of another floating dtype is read as it is

    assert fastdiff.sample(model, SHAPE, steps=3, model_dtype=torch.bfloat16).dtype == torch.float32


def test_modes_come_back():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3), nn.Identity())
    model[1].eval()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x, t):
            assert not any(m.training for m in self.modules())
            if fail:
                raise RuntimeError("as asked")
            return self.body(x)

    network, flags = Network(), [True, True, True, False, True]
    for fail in (False, True):
        assert [m.training for m in network.modules()] == flags
        if fail:
            with pytest.raises(RuntimeError, match="as asked"):
                fastdiff.sample(network, SHAPE, steps=3)
        else:
            fastdiff.sample(network, SHAPE, steps=3)
        assert [m.training for m in network.modules()] == flags
    fail = False
    for state in fastdiff.sample_iter(network, SHAPE, steps=3):
        if state.row == 2:
            break  # a generator that is dropped
    del state
    assert [m.training for m in network.modules()] == flags


# ---- what goes wrong


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_that_fails_is_named_with_its_row(backend, value, dtype):
    def model(x, t):
        out = x * 0.5
        if int(t[0]) == 300:
            out[-1, -1, -1, -1] = value
        return out

    for run in (fastdiff.sample, lambda *a, **k: list(fastdiff.sample_iter(*a, **k))):
        with pytest.raises(FloatingPointError, match=r"row 6 of 10 \(t = 300\)"):
            run(model, SHAPE, steps=10, model_dtype=dtype, backend=backend)


@pytest.mark.parametrize(
    ("model", "error", "names"),
    [
        (lambda x, t: x[:, :2], ValueError, r"\[4, 3, 8, 8\]; got \[4, 2, 8, 8\]"),
        (lambda x, t: x[:2], ValueError, r"got \[2, 3, 8, 8\]"),
        (lambda x, t: x.sum(), ValueError, r"got \[\]"),
        (lambda x, t: torch.cat([x, x], 1), ValueError, "learned_range"),
        (lambda x, t: x.long(), TypeError, "int64"),
        (lambda x, t: x.double(), TypeError, "float64"),
        (lambda x, t: None, TypeError, "NoneType"),
        (lambda x, t: [x], TypeError, "list"),
        (lambda x, t: (), TypeError, "tuple"),
        (lambda x, t: {"sample": x}, TypeError, "dict"),
        (lambda x, t: x.mul_(0.5), ValueError, "in place"),
        (lambda x, t: x.to("meta"), ValueError, "device"),
    ],
)
def test_a_network_that_returns_something_else(backend, model, error, names):
    with pytest.raises(error, match=names):
        fastdiff.sample(model, SHAPE, steps=3, backend=backend)


class Network(nn.Module):
    def forward(self, x, t):
        return x


class DemoPipeline:
    unet = Network()

    def __call__(self, prompt, steps):
        raise AssertionError("called")


class Wrapper:
    """A callable of one's own may have a unet."""

    unet = Network()

    def __call__(self, x, t):
        return self.unet(x, t)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Network, r"got the class Network: make one, Network\(…\)"),
        (DemoPipeline(), r"got DemoPipeline: give its network, \.unet"),
        (fastdiff.models.digits(), r"got TrainedModel: give its network, \.unet"),
        (3, r"called as model\(x, t\); got int"),
    ],
)
def test_what_is_no_network(model, names):
    with pytest.raises(TypeError, match=names):
        fastdiff.sample(model, SHAPE, steps=3)
    fastdiff.sample(Wrapper(), SHAPE, steps=3)


def test_a_dtype_mismatch_inside_a_network_is_explained():
    """torch's own words first, then what was given and which argument says otherwise."""
    linear, table = nn.Linear(8, 8).bfloat16(), torch.arange(1000.0)
    conv, embedding = nn.Conv2d(3, 3, 1).half(), nn.Embedding(1000, 8)
    for model in (lambda x, t: linear(x), lambda x, t: conv(x), lambda x, t: x @ linear.weight):
        with pytest.raises(RuntimeError, match=r"dtype|type.*x in torch.float32 and t in torch.int64; model_dtype="):
            fastdiff.sample(model, SHAPE, steps=3)
    fastdiff.sample(lambda x, t: linear(x), SHAPE, steps=3, model_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"Long and Float: .*t\.to\(x\.dtype\)"):
        fastdiff.sample(lambda x, t: nn.Linear(1, 8)(t[:, None]).view(4, 1, 1, 8) * x, SHAPE, steps=3)
    indexed = (
        lambda x, t: x * embedding(t).view(4, 1, 1, 8),
        lambda x, t: x * table[t].view(4, 1, 1, 1),
        lambda x, t: x * table.gather(0, t).view(4, 1, 1, 1),
        lambda x, t: x * nn.functional.one_hot(t, 1000).sum(),
    )
    for model in indexed:
        options = {"sampler": "dpm2", "steps": 4}
        with pytest.raises(RuntimeError, match=r't in torch.float32, since .*sampler_options=\{"quantize": True\}'):
            fastdiff.sample(model, SHAPE, **options)
        fastdiff.sample(model, SHAPE, sampler_options={"quantize": True}, **options)

    def fails(x, t):
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match=r"^of its own$"):
        fastdiff.sample(fails, SHAPE, steps=3)


VIEWS = {
    "transposed": lambda x: x.transpose(2, 3),
    "one channel for all": lambda x: x[:, :1].expand_as(x),
    "one sample for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_network_may_return_a_view_of_its_input(backend, seed, view, dtype):
    shape = (4, 3, 64, 64)  # larger than what a kernel holds at a time
    options = {"sampler": "ddim", "steps": 4, "seed": seed, "model_dtype": dtype, "backend": backend}
    seen = fastdiff.sample(lambda x, t: view(x), shape, **options)
    assert_same_bits(seen, fastdiff.sample(lambda x, t: view(x).clone(), shape, **options))


def test_learned_variance_needs_its_channels():
    with pytest.raises(ValueError, match="6 channels"):
        fastdiff.sample(half, SHAPE, steps=3, variance="learned_range")


def test_a_network_may_change_a_private_copy_of_its_input(seed):
    """Where the input is a bfloat16 copy, not the state itself, changing it in place does no harm."""
    options = {"steps": 5, "seed": seed, "model_dtype": torch.bfloat16}
    assert_same_bits(
        fastdiff.sample(lambda x, t: x.mul_(0.5), SHAPE, **options), fastdiff.sample(half, SHAPE, **options)
    )


def test_two_runs_at_once_hold_a_training_module_in_eval_mode():
    """The first run to end does not put the module back into training mode under the other."""
    barrier, modes = threading.Barrier(2), []

    class Net(torch.nn.Module):
        def forward(self, x, t):
            modes.append(self.training)
            return x

    net = Net().train()

    def run(steps):
        barrier.wait()
        fastdiff.sample(net, (1, 3), sampler="ddim", steps=steps, device="cpu")

    threads = [threading.Thread(target=run, args=(steps,)) for steps in (2, 400)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(modes) == 402
    assert not any(modes)
    assert net.training


# ---- signatures, a sampler's function, and whose fault NaN is


class Interrupted(torch.nn.Module):
    """Ctrl-C comes while its flag is given back."""

    left = 1

    def __setattr__(self, name, value):
        if name == "training" and value and self.__dict__.get("left", self.left) and self.__dict__.get("armed"):
            self.__dict__["left"] = 0
            raise KeyboardInterrupt
        super().__setattr__(name, value)

    def forward(self, x, t):
        return x * 0.5


def test_an_interrupt_leaves_no_module_in_eval_mode():
    network = Interrupted().train()
    network.__dict__["armed"] = True
    with pytest.raises(KeyboardInterrupt):
        fastdiff.sample(network, SHAPE, steps=2)
    assert network.training
    fastdiff.sample(network, SHAPE, steps=2)
    assert network.training


class Stop(BaseException):
    """What a signal's handler raises."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timer's signals")
@pytest.mark.parametrize("gap", [0.0, 0.001])
def test_signals_leave_no_module_in_eval_mode(rng, gap):
    """One, or one after another, at any moment of entering and leaving: the flags are right and nothing is held."""
    network = nn.Sequential(*(nn.Dropout() for _ in range(40))).train()
    network[3].eval()
    flags = [module.training for module in network.modules()]

    def enter_and_leave():
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1e-3), gap)
        while True:
            with eval_mode(network):
                pass

    def stop(number, frame):
        while frame is not None:  # not in what the test itself does after
            if frame.f_code is enter_and_leave.__code__:
                raise Stop
            frame = frame.f_back

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(200):
            with pytest.raises(Stop):
                enter_and_leave()
            signal.setitimer(signal.ITIMER_REAL, 0)
            gc.collect(0)
            assert [module.training for module in network.modules()] == flags
            assert not any(module in _held for module in network.modules())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
