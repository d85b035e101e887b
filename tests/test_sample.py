"""sample and sample_iter: whose noise, stopping and resuming, networks of every kind, and what goes wrong."""

import math
import threading

import pytest
import torch
from helpers import Affine, assert_same_bits
from torch import nn

import fastdiff
from fastdiff.plan import Plan, Row
from fastdiff.run import State

SHAPE = (4, 3, 8, 8)


def half(x, t):
    return x * 0.5


# ---- whose noise


@pytest.mark.parametrize("options", [{"sampler": "ddpm", "steps": 20}, {"sampler": "ddim", "steps": 9, "eta": 0.8}])
def test_an_image_is_its_number(backend, seed, options):
    whole = fastdiff.sample(half, SHAPE, seed=seed, backend=backend, **options)
    for first, count in ((0, 1), (0, 3), (3, 1), (1, 3)):
        part = fastdiff.sample(half, (count, *SHAPE[1:]), seed=seed, sample_offset=first, backend=backend, **options)
        assert_same_bits(part, whole[first : first + count])


def test_acceptance():
    a = fastdiff.sample(half, (64, 3, 32, 32), steps=5, seed=42)[17]
    assert_same_bits(a, fastdiff.sample(half, (1, 3, 32, 32), steps=5, seed=42, sample_offset=17)[0])


def test_seeds(seed):
    seeds = [9, 2**64 - 1, 9]
    images = fastdiff.sample(half, (3, 3, 8, 8), steps=5, seeds=seeds)
    for k, value in enumerate(seeds):
        assert_same_bits(images[k], fastdiff.sample(half, (1, 3, 8, 8), steps=5, seed=value)[0])
    assert not torch.equal(images[0], images[1])


def test_default_seed_is_zero():
    assert_same_bits(fastdiff.sample(half, SHAPE, steps=5), fastdiff.sample(half, SHAPE, steps=5, seed=0))
    assert not torch.equal(fastdiff.sample(half, SHAPE, steps=5, seed=1), fastdiff.sample(half, SHAPE, steps=5))


@pytest.mark.parametrize("options", [{"clip": 1.0}, {"sampler": "ddim", "eta": 1.0}, {"variance": "learned_range"}])
def test_backends_have_the_same_bits(simd, seed, options):
    def model(x, t):
        out = x * 0.5 + t.view(-1, 1, 1, 1) * 1e-4
        return torch.cat([out, x * 0.1], dim=1) if "variance" in options else out

    a, b = (fastdiff.sample(model, SHAPE, steps=25, seed=seed, backend=which, **options)
            for which in ("reference", "native"))  # fmt: skip
    assert_same_bits(a, b)


def test_noise_fn():
    asked = []

    def noise(stream, draw, shape):
        asked.append((stream, draw, shape))
        return torch.full(shape, 0.5, dtype=torch.float64)

    plan = fastdiff.samplers.ddpm(fastdiff.NoiseSchedule.linear(), 4)
    got = fastdiff.sample(half, (2, 5), sampler=plan, noise_fn=noise)
    assert asked == [(0, 0, (2, 5)), (1, 0, (2, 5)), (1, 1, (2, 5)), (1, 2, (2, 5))]
    x = torch.full((2, 5), 0.5)
    for row in range(4):
        x = fastdiff.ops.update(x, x * 0.5, plan, row, noise=torch.full((2, 5), 0.5)).x
    assert_same_bits(got, x)
    for bad, error in ((lambda *a: torch.zeros(2, 4), ValueError), (lambda *a: 1.0, TypeError),
                       (lambda *a: torch.zeros(2, 5, dtype=torch.int64), ValueError)):  # fmt: skip
        with pytest.raises(error, match=r"noise_fn\(0, 0"):
            fastdiff.sample(half, (2, 5), steps=4, noise_fn=bad)


def test_noise_fn_keeps_its_tensor(seed):
    noise = torch.randn(SHAPE)
    before = noise.clone()
    got = fastdiff.sample(half, SHAPE, steps=5, noise_fn=lambda stream, draw, shape: noise)
    assert_same_bits(noise, before)
    assert_same_bits(got, fastdiff.sample(half, SHAPE, steps=5, noise_fn=lambda *a: before.clone()))


def test_the_stream_is_the_plain_randn(seed):
    """x_T is stream 0, row i's noise is (stream 1, draw i)."""
    plan = fastdiff.samplers.ddpm(fastdiff.NoiseSchedule.linear(), 4)
    got = fastdiff.sample(half, SHAPE, sampler=plan, seed=seed)
    streams = fastdiff.sample(
        half, SHAPE, sampler=plan, noise_fn=lambda stream, draw, shape: fastdiff.randn(shape, seed=seed, draw=draw,
                                                                                         stream=stream)
    )  # fmt: skip
    assert_same_bits(got, streams)


# ---- stopping, resuming, starting from an image


def history_plan():
    """Rows with an anchor, slots, other levels and a row without a network call, to be resumed anywhere."""
    rows = []
    for i, t in enumerate((40, 30, 20, 20, 10, 0)):
        rows.append(
            Row(
                t=t, alpha=0.5, sigma=0.8, x={"x": 0.5, "slot0": 0.2, "anchor": 0.1, "z": 0.3 if i < 5 else 0.0},
                p=0.9, q=-0.1 if i != 3 else 0.0, anchor={"x": 1.0} if i == 1 else None,
                slot={"x0": 1.0, "x": 0.5} if i % 2 == 0 else None, write=i // 2 if i % 2 == 0 else None,
                reads=(i // 3,), c_in=1 / (i + 1), calls_model=i != 3,
            )
        )  # fmt: skip
    return Plan(tuple(rows))


@pytest.mark.parametrize("which", ["ddpm", "ddim", "history"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_runs_have_the_bits_of_a_straight_one(backend, seed, which, dtype):
    options = {"sampler": which, "steps": 6} if which != "history" else {"sampler": history_plan()}
    if which == "ddim":
        options["eta"] = 0.6
    options |= {"seed": seed, "backend": backend, "model_dtype": dtype}
    straight = fastdiff.sample(half, SHAPE, **options)
    states = list(fastdiff.sample_iter(half, SHAPE, **options))
    assert [state.row for state in states] == [1, 2, 3, 4, 5, 6]
    assert_same_bits(states[-1].x, straight)
    for state in states:
        assert_same_bits(fastdiff.sample(half, SHAPE, resume=state, **options), straight, f"from row {state.row}")
    again = list(fastdiff.sample_iter(half, SHAPE, resume=states[2], **options))
    assert [state.row for state in again] == [4, 5, 6]
    for a, b in zip(again, states[3:], strict=True):
        assert_same_bits(a.x, b.x)
        assert_same_bits(a.x0, b.x0)


def test_states_are_fresh_tensors(seed):
    states = []
    final = fastdiff.sample(half, SHAPE, steps=4, callback=states.append)
    assert [state.row for state in states] == [1, 2, 3, 4]
    addresses = {t.data_ptr() for state in states for t in (state.x, state.x0)} | {final.data_ptr()}
    assert len(addresses) == 9
    kept = states[1].x.clone()
    states[0].x.zero_()
    states[1].x0.fill_(7)
    assert_same_bits(states[1].x, kept)
    assert_same_bits(states[-1].x, fastdiff.sample(half, SHAPE, steps=4))


def test_a_state_is_not_changed_by_resuming(seed):
    state = next(fastdiff.sample_iter(half, SHAPE, sampler=history_plan()))
    before = [t.clone() for t in (state.x, state.anchor, state.slots[0])]
    fastdiff.sample(half, SHAPE, sampler=history_plan(), resume=state)
    for a, b in zip((state.x, state.anchor, state.slots[0]), before, strict=True):
        assert_same_bits(a, b)


def test_an_image_to_start_from(seed):
    plan = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 10)
    image, seen = torch.rand(SHAPE) * 2 - 1, []

    def model(x, t):
        seen.append((x.clone(), t.clone()))
        return x * 0.5

    for start in (0, 3, 9):
        seen.clear()
        got = fastdiff.sample(model, SHAPE, sampler=plan, x_init=image, start_step=start, seed=seed)
        assert len(seen) == 10 - start
        assert set(seen[0][1].tolist()) == {plan[start].t}
        row, z = plan[start], fastdiff.randn(SHAPE, seed=seed, stream=0)
        bar = fastdiff.NoiseSchedule.linear().alphas_cumprod[int(row.t)]
        expected = bar.sqrt() * image.double() + (1 - bar).sqrt() * z.double()
        torch.testing.assert_close(seen[0][0].double(), expected, rtol=0, atol=1e-6)
        state = State(seen[0][0], None, None, (None,) * 4, start)
        assert_same_bits(got, fastdiff.sample(half, SHAPE, sampler=plan, resume=state, seed=seed))
    half_image = fastdiff.sample(half, SHAPE, sampler=plan, x_init=image.half(), start_step=9)
    assert half_image.dtype == torch.float32


def test_init_sigma():
    plan = Plan((Row(t=0, alpha=1, sigma=80, x={"x": 1.0}),), init_sigma=80.0)
    assert_same_bits(fastdiff.sample(half, SHAPE, sampler=plan, seed=3), fastdiff.randn(SHAPE, seed=3) * 80 + 0.0)


# ---- networks


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
    for x, state in zip(inputs[1:], states, strict=False):
        assert_same_bits(x, state.x.to(dtype))
    assert model.training


def test_model_dtype_of_a_function():
    def model(x, t):
        assert x.dtype == torch.bfloat16
        return x.float() * 0.5  # an output of another floating dtype is read as it is

    assert fastdiff.sample(model, SHAPE, steps=3, model_dtype=torch.bfloat16).dtype == torch.float32


def test_float_timesteps():
    plan = Plan((Row(t=2.5, alpha=1, sigma=1, x={"x": 1.0}), Row(t=1, alpha=1, sigma=1, x={"m": 1.0})))
    model = Affine()
    fastdiff.sample(model, SHAPE, sampler=plan)
    assert [(t.dtype, t[0].item()) for _, t in model.seen] == [(torch.float32, 2.5), (torch.float32, 1.0)]


def test_c_in_scales_what_the_network_reads(seed):
    model = Affine()
    states = list(fastdiff.sample_iter(model, SHAPE, sampler=history_plan(), seed=seed))
    xs = [fastdiff.randn(SHAPE, seed=seed), *(state.x for state in states)]
    calls = [i for i in range(6) if i != 3]
    for (x, t), i in zip(model.seen, calls, strict=True):
        assert_same_bits(x, xs[i] * (1 / (i + 1)))
        assert t[0] == (40, 30, 20, 20, 10, 0)[i]


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


def test_gradients_are_off_only_inside():
    weight = torch.ones(1, requires_grad=True)
    for state in fastdiff.sample_iter(lambda x, t: x * weight, SHAPE, steps=3):
        assert torch.is_grad_enabled()
        assert not state.x.requires_grad
    assert not fastdiff.sample(lambda x, t: x * weight, SHAPE, steps=3).requires_grad


def test_learned_variance(backend, seed):
    plan = fastdiff.samplers.ddpm(fastdiff.NoiseSchedule.linear(), 5, variance="learned_range")
    got = fastdiff.sample(lambda x, t: torch.cat([x * 0.5, x * 0.3], 1), SHAPE, sampler=plan, seed=seed,
                          backend=backend)  # fmt: skip
    x = fastdiff.randn(SHAPE, seed=seed)
    for row in range(5):
        x = fastdiff.ops.update(x, torch.cat([x * 0.5, x * 0.3], 1), plan, row, seed=seed, backend="reference").x
    assert_same_bits(got, x)


def test_an_empty_batch(backend):
    got = fastdiff.sample(half, (0, 3, 8, 8), steps=3, backend=backend)
    assert got.shape == (0, 3, 8, 8)
    assert got.dtype == torch.float32


def test_a_progress_bar(capsys):
    fastdiff.sample(half, (1, 4), steps=5, progress=True)
    assert "5/5" in capsys.readouterr().err
    fastdiff.sample(half, (1, 4), steps=5)
    assert capsys.readouterr().err == ""


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


def test_learned_variance_needs_its_channels():
    with pytest.raises(ValueError, match="6 channels"):
        fastdiff.sample(half, SHAPE, steps=3, variance="learned_range")


def test_a_network_may_change_a_private_copy_of_its_input(seed):
    """Where the input is a bfloat16 copy, not the state itself, changing it in place does no harm."""
    options = {"steps": 5, "seed": seed, "model_dtype": torch.bfloat16}
    assert_same_bits(
        fastdiff.sample(lambda x, t: x.mul_(0.5), SHAPE, **options), fastdiff.sample(half, SHAPE, **options)
    )


def test_interrupted():
    """Ctrl-C inside the network: modes come back, and the next run has its bits."""
    model = Affine()
    expected = fastdiff.sample(model, SHAPE, steps=5)
    calls = []

    def hook(module, arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        fastdiff.sample(model, SHAPE, steps=5, progress=True)
    handle.remove()
    assert model.training
    assert torch.is_grad_enabled()
    assert_same_bits(fastdiff.sample(model, SHAPE, steps=5), expected)


def test_two_runs_at_once():
    shape = (2, 3, 32, 32)
    expected = [fastdiff.sample(half, shape, steps=20, seed=k) for k in range(4)]
    got: dict[int, torch.Tensor] = {}
    gate = threading.Barrier(4)

    def work(k):
        gate.wait()
        got[k] = fastdiff.sample(half, shape, steps=20, seed=k)

    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    for k in range(4):
        assert_same_bits(got[k], expected[k])
