"""sample and sample_iter: whose noise, stopping and resuming, networks of every kind, and what goes wrong."""

import importlib
import inspect
import math
import threading

import pytest
import torch
from helpers import Affine, assert_same_bits, half, history_plan

import fastdiff
from fastdiff.plan.plan import Plan, Row
from fastdiff.sampling.stepper import State

SHAPE = (4, 3, 8, 8)


# ---- whose noise


@pytest.mark.parametrize("options", [{"sampler": "ddpm", "steps": 20}, {"sampler": "ddim", "steps": 9, "eta": 0.8}])
def test_an_image_is_its_number(backend, seed, options):
    whole = fastdiff.sample(half, SHAPE, seed=seed, backend=backend, **options)
    for first, count in ((0, 1), (0, 3), (3, 1), (1, 3)):
        part = fastdiff.sample(half, (count, *SHAPE[1:]), seed=seed, sample_offset=first, backend=backend, **options)
        assert_same_bits(part, whole[first : first + count])


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "heun"])
def test_a_default_device_is_for_networks(seed, sampler):
    """A plan is the host's, wherever torch.set_default_device puts new tensors: "meta" would lose its numbers."""
    expected = fastdiff.sample(half, SHAPE, sampler=sampler, steps=5, seed=seed)
    with torch.device("meta"):
        schedule = fastdiff.NoiseSchedule.linear()
        got = fastdiff.sample(half, SHAPE, sampler=sampler, schedule=schedule, steps=5, seed=seed, device="cpu")
        assert len(fastdiff.NoiseSchedule.from_betas([0.1, 0.2])) == 2
    assert_same_bits(got, expected)


@pytest.mark.parametrize("options", [{}, {"sampler": "dpmpp_2m"}, {"model_kwargs": {"y": torch.ones(4)}}])
def test_inference_mode(seed, options):
    """Within it and without, the same; what comes out is a plain tensor, which can be written to anywhere."""
    model = torch.nn.Conv2d(3, 3, 3, padding=1)

    def network(x, t, y=None):
        return model(x) if y is None else model(x) * y.view(-1, 1, 1, 1)

    options = {"steps": 5, "seed": seed, "x_init": torch.randn(SHAPE), **options}
    expected = fastdiff.sample(network, SHAPE, **options)
    with torch.inference_mode():
        options["x_init"] = options["x_init"].clone()
        got = fastdiff.sample(network, SHAPE, **options)
        states = list(fastdiff.sample_iter(network, SHAPE, **options))
        resumed = fastdiff.sample(network, SHAPE, resume=states[1], **{**options, "x_init": None})
    for images in (got, states[-1].x, resumed):
        assert_same_bits(images, expected)
        assert not images.is_inference()


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


@pytest.mark.parametrize("which", ["ddpm", "ddim", "history"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_runs_have_the_bits_of_a_straight_one(backend, seed, which, dtype):
    options = {"sampler": which, "steps": 6} if which != "history" else {"sampler": history_plan()}
    if which == "ddim":
        options["eta"] = 0.6
    options |= {"seed": seed, "backend": backend, "model_dtype": dtype}
    straight = fastdiff.sample(half, SHAPE, **options)
    states = list(fastdiff.sample_iter(half, SHAPE, **options))
    assert [state.row for state in states] == [0, 1, 2, 3, 4, 5, 6]
    assert states[0].x0 is None
    assert_same_bits(states[-1].x, straight)
    for state in states:
        assert_same_bits(fastdiff.sample(half, SHAPE, resume=state, **options), straight, f"from row {state.row}")
    again = list(fastdiff.sample_iter(half, SHAPE, resume=states[2], **options))
    assert [state.row for state in again] == [2, 3, 4, 5, 6]
    for a, b in zip(again, states[2:], strict=True):
        assert_same_bits(a.x, b.x)
        assert a.x0 is None if a is again[0] else not assert_same_bits(a.x0, b.x0)


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
    _, state, *_ = fastdiff.sample_iter(half, SHAPE, sampler=history_plan())
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


# ---- interruptions and threads


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


# ---- signatures, a sampler's function, and whose fault NaN is


def test_signatures():
    assert inspect.signature(fastdiff.sample_iter) == inspect.signature(fastdiff.sample)
    for name in ("sample", "interpolate", "stepper", "graph"):
        assert inspect.ismodule(importlib.import_module(f"fastdiff.sampling.{name}"))
        assert inspect.ismodule(getattr(fastdiff.sampling, name))
    for name, sampler in fastdiff.samplers.SAMPLERS.items():
        parameters = inspect.signature(sampler).parameters.values()
        assert not any(p.kind == p.VAR_KEYWORD for p in parameters), name
        assert "Args:" in sampler.__doc__
        assert "spacing" in {p.name for p in parameters}
    with pytest.raises(TypeError, match=r"heun\(\).*spaceing"):
        fastdiff.samplers.heun(fastdiff.NoiseSchedule.linear(), 5, spaceing="karras")


def test_a_function_is_a_sampler(seed):
    given = []

    def mine(schedule, steps, *, clip=None, spacing=None):
        given.append((schedule, steps, clip, spacing))
        return fastdiff.samplers.ddim(schedule, steps, clip=clip, spacing=spacing)

    got = fastdiff.sample(half, SHAPE, sampler=mine, steps=4, clip=1.0, seed=seed, sampler_options={"skip": 1})
    assert given == [(fastdiff.NoiseSchedule.linear(), 4, 1.0, fastdiff.Spacing(skip=1))]
    same = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 4, clip=1.0, spacing=fastdiff.Spacing(skip=1))
    assert_same_bits(got, fastdiff.sample(half, SHAPE, sampler=same, seed=seed))
    with pytest.raises(ValueError, match="mine does not take prediction; it takes clip, spacing"):
        fastdiff.sample(half, SHAPE, sampler=mine, steps=4, prediction="sample")
    with pytest.raises(TypeError, match="must return a Plan"):
        fastdiff.sample(half, SHAPE, sampler=lambda schedule, steps: 3, steps=4)
    with pytest.raises(ValueError, match=r"'heun' does not take order; it takes prediction, .*s_churn.*timesteps"):
        fastdiff.sample(half, SHAPE, sampler="heun", steps=4, sampler_options={"order": 2})
    with pytest.raises(TypeError, match="names must be str"):
        fastdiff.sample(half, SHAPE, steps=4, sampler_options={1: 2})


def test_options_of_a_spacing():
    """A field of ``Spacing`` beside the sampler's own options, or in a Spacing: the same plan."""
    options = {"steps": 6, "sampler": "dpmpp_2m", "seed": 1}
    karras = fastdiff.Spacing("karras", rho=5.0, final="sigma_min")
    a = fastdiff.sample(half, SHAPE, spacing=karras, **options)
    b = fastdiff.sample(half, SHAPE, spacing="karras", sampler_options={"rho": 5.0, "final": "sigma_min"}, **options)
    assert_same_bits(a, b)
    with pytest.raises(ValueError, match="rho is given twice"):
        fastdiff.sample(half, SHAPE, spacing=karras, sampler_options={"rho": 3.0}, **options)
    with pytest.raises(ValueError, match="strength leaves out"):
        fastdiff.sample(
            half, SHAPE, spacing=fastdiff.Spacing(skip=2), x_init=torch.zeros(SHAPE), strength=0.5, **options
        )


def test_plans_compare_by_rows():
    a, b, c = (fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), n) for n in (5, 5, 6))
    assert a == b
    assert hash(a) == hash(b)
    assert a != c
    assert a != 3


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("author", "options"),
    [
        ("cond_fn", {"cond_fn": lambda x, t: x * math.nan}),
        ("noise_fn", {"noise_fn": lambda stream, draw, shape: torch.full(shape, math.inf if stream else 1.0)}),
        ("noise_fn", {"noise_fn": lambda stream, draw, shape: torch.full(shape, math.nan)}),
    ],
)
def test_nan_is_told_of_its_author(author, options, steps):
    """In the last row, too, which nothing reads; a row that draws no noise asks for none."""
    if steps == 1 and "noise_fn" in options and bool(options["noise_fn"](0, 0, (1,)).isfinite()):
        steps = 2
    for run in (fastdiff.sample, lambda *a, **k: list(fastdiff.sample_iter(*a, **k))):
        with pytest.raises(FloatingPointError, match=author):
            run(half, SHAPE, sampler="ddim" if author == "cond_fn" else "ddpm", steps=steps, **options)


def test_numbers_beyond_float32():
    steep = fastdiff.NoiseSchedule.linear(1000, 0.02, 0.5)
    with pytest.raises(ValueError, match=r"plan 'ddim' cannot run in float32: p of row 0"):
        fastdiff.sample(half, SHAPE, sampler="ddim", steps=5, schedule=steep)
    far = fastdiff.Plan((fastdiff.Row(t=0, alpha=1, sigma=1, x={"x": 1e38, "m": 1e38}),))
    with pytest.raises(FloatingPointError, match="beyond float32"):
        fastdiff.sample(lambda x, t: x * 10, SHAPE, sampler=far)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"shape": (4,), "variance": "learned_range"}, ValueError, "learned variance"),
        ({"shape": (2, 0, 4, 4), "variance": "learned_range"}, ValueError, "learned variance"),
        ({"noise_fn": lambda stream, draw, shape: torch.zeros(shape).to_sparse()}, ValueError, "noise_fn.*dense"),
        ({"seeds": torch.zeros(4, dtype=torch.int64).to_sparse()}, TypeError, "seeds"),
        ({"seeds": torch.zeros(4, dtype=torch.int64, device="meta")}, TypeError, "seeds"),
        ({"guidance_scale": 10**400}, ValueError, "guidance_scale"),
        ({"device": 2.5}, TypeError, "device"),
        ({"device": 10**400}, ValueError, "device"),
        ({"backend": []}, TypeError, "backend"),
    ],
)
def test_unclear_arguments_are_named(options, error, names):
    options = dict(options)
    with pytest.raises(error, match=names):
        fastdiff.sample(half, options.pop("shape", SHAPE), steps=3, **options)


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
