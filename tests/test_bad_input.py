"""Any arguments at all: the public functions work, or raise ValueError or TypeError before the network is called."""

import math

import pytest
import torch

import fastdiff

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st

SHAPE = (2, 3, 4, 4)
REFUSED = (ValueError, TypeError)
U64 = (1 << 64) - 1

# Values of every wrong kind, and some right ones.
odd_numbers = st.sampled_from([-1, 0, 1, 2, 3, 1000, 1 << 32, U64, 1 << 64, 1.0, 0.5, -0.5, 1e400, math.nan, -math.inf])
odd_values = st.one_of(
    odd_numbers,
    st.sampled_from([None, True, False, "", "ddim", "linear", "cpu", b"x", (), [], {}, object(), print, torch.float32]),
    st.sampled_from([torch.zeros(2), torch.zeros(SHAPE), torch.tensor(3), torch.zeros(2, dtype=torch.int64)]),
    st.lists(st.integers(-2, 5), max_size=3),
)
sizes = st.one_of(st.lists(st.integers(-1, 4), max_size=4), st.tuples(st.integers(0, 3), st.integers(0, 3)), odd_values)


class Counting:
    """A network that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, t, **kwargs):
        self.calls += 1
        return x * 0.5


def refused_or(check, function, *arguments, **keywords):
    """Call it; it raises what it may, or ``check`` sees the result."""
    try:
        result = function(*arguments, **keywords)
    except REFUSED:
        return None
    check(result)
    return result


def some_of(options):
    """Up to three of the keywords, each with a value of any kind."""
    return st.dictionaries(st.sampled_from(sorted(options)), odd_values, max_size=3)


@settings(max_examples=300)
@given(sizes, some_of({"seed", "seeds", "draw", "stream", "sample_offset", "device", "dtype", "backend",
                       "memory_format"}))  # fmt: skip
def test_randn(shape, options):
    def check(z):
        assert tuple(z.shape) == tuple(shape)
        assert bool(z.isfinite().all())

    if options.get("backend") == "triton":
        options.pop("backend")
    refused_or(check, fastdiff.randn, shape, **options)


tensors = st.one_of(
    odd_values,
    st.builds(
        lambda size, dtype: torch.zeros(size, dtype=dtype), st.lists(st.integers(0, 3), max_size=4),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool,
                         torch.complex64]),
    ),
)  # fmt: skip
timesteps = st.one_of(odd_values, st.lists(st.integers(-1, 1001), max_size=3).map(lambda v: torch.tensor(v).long()))


@settings(max_examples=300)
@given(tensors, timesteps, st.one_of(st.just("linear"), odd_values),
       some_of({"noise", "seed", "seeds", "draw", "sample_offset", "backend"}))  # fmt: skip
@example(torch.zeros(2, 3), torch.tensor([0, 1000]), "linear", {})
def test_add_noise(x0, t, schedule, options):
    def check(result):
        assert result[0].shape == result[1].shape == x0.shape

    refused_or(check, fastdiff.add_noise, x0, t, schedule, **options)


numbers = st.lists(st.one_of(st.floats(), st.floats(0, 1), st.none()), max_size=4)


@settings(max_examples=200)
@given(st.sampled_from(["linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_betas"]), odd_values,
       st.lists(st.one_of(st.floats(), odd_values), max_size=3))  # fmt: skip
def test_named_schedules(name, T, rest):
    if isinstance(T, int) and T > 10**6:
        return  # a schedule that long is the caller's memory

    def check(schedule):
        bars = schedule.alphas_cumprod
        assert len(schedule) == T
        assert bool(((bars >= 0) & (bars <= 1)).all())
        assert bool((bars[1:] <= bars[:-1]).all())

    refused_or(
        check, getattr(fastdiff.NoiseSchedule, name), T, *rest[: 2 if "linear" in name or "betas" in name else 3]
    )


@settings(max_examples=200)
@given(st.sampled_from(["from_betas", "from_alphas_cumprod"]), st.one_of(numbers, odd_values, tensors))
@example("from_betas", [0.1, math.nan])
def test_schedules_of_numbers(name, values):
    refused_or(lambda s: s.betas.isfinite().all(), getattr(fastdiff.NoiseSchedule, name), values)


@settings(max_examples=200)
@given(st.sampled_from(["ddpm", "ddim"]), odd_values,
       some_of({"prediction", "clip", "spacing", "timesteps", "eta", "variance"}))  # fmt: skip
def test_samplers(name, steps, options):
    options.pop("variance" if name == "ddim" else "eta", None)
    schedule = fastdiff.NoiseSchedule.linear(20)

    def check(plan):
        assert all(0 <= t < 20 for t in plan.timesteps)

    refused_or(check, getattr(fastdiff.samplers, name), schedule, steps, **options)


SAMPLE = {
    "sampler", "steps", "schedule", "prediction", "variance", "spacing", "eta", "clip", "sampler_options", "seed",
    "seeds", "sample_offset", "generator", "noise_fn", "x_init", "start_step", "resume", "model_kwargs",
    "uncond_kwargs", "guidance_scale", "guidance_rescale", "device", "model_dtype", "backend", "cuda_graph", "callback",
    "strength", "mask", "known", "guidance_interval", "thresholding", "cond_fn",
}  # fmt: skip


@settings(max_examples=600)
@pytest.mark.filterwarnings("ignore:guidance_scale")
@given(st.one_of(st.just(SHAPE), sizes), some_of(SAMPLE))
@example(SHAPE, {"steps": 1001})
@example(SHAPE, {"seed": 1 << 64})
@example(SHAPE, {"seed": 1, "seeds": [1, 2]})
@example(SHAPE, {"x_init": torch.zeros(2, 3, 4, 5)})
@example(SHAPE, {"x_init": torch.zeros(SHAPE, dtype=torch.int64)})
@example(SHAPE, {"start_step": 3})
@example(SHAPE, {"cuda_graph": True})
@example(SHAPE, {"device": "cuda:99"})
@example(SHAPE, {"mask": torch.ones(SHAPE), "known": torch.zeros(2)})
@example(SHAPE, {"mask": torch.tensor(3), "known": torch.zeros(SHAPE)})
@example(SHAPE, {"strength": 0.5, "x_init": torch.zeros(SHAPE)})
@example(SHAPE, {"guidance_scale": [2.0, 3.0], "uncond_kwargs": {}})
def test_sample(shape, options):
    model = Counting()
    options = {"steps": 2, **options}
    if (isinstance(options["steps"], int) and options["steps"] > 10) or options["steps"] is None:
        options["schedule"] = fastdiff.NoiseSchedule.linear(20)
    if print in (options.get("noise_fn"), options.get("callback"), options.get("cond_fn")):
        return  # callables that are called

    def check(x):
        assert tuple(x.shape) == tuple(shape)
        assert x.dtype == torch.float32

    if refused_or(check, fastdiff.sample, model, shape, **options) is None:
        assert model.calls == 0, "refused, but the network was called"


def test_sample_iter_checks_at_the_call():
    """Not at the first row."""
    for options in ({"steps": 0}, {"seed": -1}, {"sampler": "eular"}, {"unknown": 1}):
        with pytest.raises(REFUSED):
            fastdiff.sample_iter(Counting(), SHAPE, **options)


@pytest.mark.parametrize("model", [None, 3, "model", torch.zeros(2)])
def test_a_model_that_cannot_be_called(model):
    with pytest.raises(TypeError, match="model"):
        fastdiff.sample(model, SHAPE)


@pytest.mark.parametrize("name", ["steps", "schedule", "prediction", "variance", "spacing", "eta", "clip"])
def test_a_plan_fixes_its_arguments(name):
    plan = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 3)
    value = {"steps": 3, "schedule": "linear", "eta": 0.0, "clip": 1.0, "prediction": "epsilon",
             "variance": "fixed_small", "spacing": "leading"}[name]  # fmt: skip
    with pytest.raises(ValueError, match=name):
        fastdiff.sample(Counting(), SHAPE, sampler=plan, **{name: value})


def test_options_of_other_samplers():
    for options in ({"sampler": "ddpm", "eta": 0.5}, {"sampler": "ddim", "variance": "fixed_large"},
                    {"sampler": "ddpm", "sampler_options": {"use_clipped_model_output": True}},
                    {"sampler": "ddim", "eta": 0.5, "sampler_options": {"eta": 0.5}}):  # fmt: skip
        with pytest.raises(ValueError, match=r"does not take|repeats"):
            fastdiff.sample(Counting(), SHAPE, **options)


UPDATE = {
    "guidance", "seed", "seeds", "sample_offset", "anchor", "slots", "noise", "gain", "clip", "gradient", "mask",
    "known", "known_noise", "model_dtype", "channels_last", "backend",
}  # fmt: skip


@settings(max_examples=400)
@given(tensors, st.one_of(tensors, st.lists(tensors, max_size=4)), odd_values, some_of(UPDATE))
@example(torch.zeros(SHAPE), torch.zeros(2, 3, 4, 5), 0, {})
@example(torch.zeros(SHAPE).transpose(2, 3), torch.zeros(SHAPE), 0, {})
@example(torch.zeros(SHAPE), [torch.zeros(SHAPE)] * 4, 0, {"guidance": (1.0,) * 4})
@example(torch.zeros(SHAPE), torch.zeros(SHAPE), 0, {"mask": torch.zeros(SHAPE)})
@example(torch.zeros(2, 3), torch.zeros(2, 3), 0, {"channels_last": True, "model_dtype": torch.float32})
def test_update(x, outputs, row, options):
    plan = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 3, eta=1.0)

    def check(result):
        assert result.x.shape == x.shape

    refused_or(check, fastdiff.ops.update, x, outputs, plan, row, **options)


@pytest.mark.parametrize("device", ["cuda:99", "cuda:1000", 1000])
def test_a_device_that_is_not_here(device):
    """torch wraps large indices around, and a CUDA build without a driver raises its own RuntimeError later."""
    with pytest.raises(ValueError, match="device is"):
        fastdiff.randn((1, 2), device=device)
