"""The steps of a run: stopping and resuming, what a row reads, and whose fault NaN is."""

import math

import pytest
import torch
from helpers import Affine, assert_same_bits, half, history_plan

import fastdiff
from fastdiff.plan.plan import Plan, Row

SHAPE = (4, 3, 8, 8)


@pytest.mark.parametrize("options", [{"clip": 1.0}, {"sampler": "ddim", "eta": 1.0}, {"variance": "learned_range"}])
def test_backends_have_the_same_bits(simd, seed, options):
    def model(x, t):
        out = x * 0.5 + t.view(-1, 1, 1, 1) * 1e-4
        return torch.cat([out, x * 0.1], dim=1) if "variance" in options else out

    a, b = (fastdiff.sample(model, SHAPE, steps=25, seed=seed, backend=which, **options)
            for which in ("reference", "native"))  # fmt: skip
    assert_same_bits(a, b)


# ---- stopping and resuming


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


# ---- signatures, a sampler's function, and whose fault NaN is


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
    calls: list[int] = []
    steep = fastdiff.NoiseSchedule.linear(1000, 0.02, 0.5)
    with pytest.raises(ValueError, match=r"plan 'ddim' cannot run in float32: p of row 0"):
        fastdiff.sample(half, SHAPE, sampler="ddim", steps=5, schedule=steep)
    far = fastdiff.Plan((fastdiff.Row(t=0, alpha=1, sigma=1, x={"x": 1e38, "m": 1e38}),))
    with pytest.raises(FloatingPointError, match="beyond float32"):
        fastdiff.sample(lambda x, t: x * 10, SHAPE, sampler=far)
    near = fastdiff.Row(t=0, alpha=1, sigma=1, x={"x": 1.0, "m": 1.0})
    model_first = fastdiff.Plan((near, far[0]))
    with pytest.raises(FloatingPointError, match=r"^the model returned NaN or infinity at row 1 of 2 \(t = 0\)$"):
        fastdiff.sample(lambda x, t: x * (math.nan if calls.append(0) or len(calls) == 2 else 1), SHAPE,
                        sampler=model_first)  # fmt: skip
    for author, more in (("the model", {}), ("cond_fn", {"cond_fn": lambda x, t: x * 10})):
        model = half if more else lambda x, t: x * 10
        plan = fastdiff.Plan((far[0], near if not more else fastdiff.Row(t=0, alpha=1, sigma=1, x={"g": 1.0})))
        with pytest.raises(
            FloatingPointError, match=rf"{author} returned .*; the plan's numbers reach 1e\+38 in earlier"
        ):
            fastdiff.sample(model, SHAPE, sampler=plan, **more)


def test_float_timesteps():
    plan = Plan((Row(t=2.5, alpha=1, sigma=1, x={"x": 1.0}), Row(t=1, alpha=1, sigma=1, x={"m": 1.0})))
    model = Affine()
    fastdiff.sample(model, SHAPE, sampler=plan)
    assert [(t.dtype, t[0].item()) for _, t in model.seen] == [(torch.float32, 2.5), (torch.float32, 1.0)]


def test_c_in_scales_what_the_network_reads(seed):
    model = Affine()
    states = list(fastdiff.sample_iter(model, SHAPE, sampler=history_plan(), seed=seed))
    xs = [state.x for state in states]
    assert_same_bits(xs[0], fastdiff.randn(SHAPE, seed=seed))
    calls = [i for i in range(6) if i != 3]
    for (x, t), i in zip(model.seen, calls, strict=True):
        assert_same_bits(x, xs[i] * (1 / (i + 1)))
        assert t[0] == (40, 30, 20, 20, 10, 0)[i]


def test_learned_variance(backend, seed):
    plan = fastdiff.samplers.ddpm(fastdiff.NoiseSchedule.linear(), 5, variance="learned_range")
    got = fastdiff.sample(lambda x, t: torch.cat([x * 0.5, x * 0.3], 1), SHAPE, sampler=plan, seed=seed,
                          backend=backend)  # fmt: skip
    x = fastdiff.randn(SHAPE, seed=seed)
    for row in range(5):
        x = fastdiff.ops.update(x, torch.cat([x * 0.5, x * 0.3], 1), plan, row, seed=seed, backend="reference").x
    assert_same_bits(got, x)
