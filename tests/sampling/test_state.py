"""States: what they say of themselves, in a file and back, and whose they are when a run goes on."""

import dataclasses
import json
import math
import struct

import pytest
import safetensors.torch
import torch
from helpers import assert_same_bits, half, history_plan

import fastdiff
from fastdiff.sampling.state import FORMAT

SHAPE = (2, 3, 4, 4)


def states_of(**options):
    return list(fastdiff.sample_iter(half, SHAPE, **options))


def test_what_a_state_says(seed):
    plan = fastdiff.samplers.euler(fastdiff.NoiseSchedule.linear(), 4, spacing="karras")
    states = states_of(sampler=plan, seed=seed)
    for state, row in zip(states, plan, strict=False):
        assert (state.t, state.level.alpha, state.level.sigma) == (row.t, row.alpha, row.sigma)
        assert state.level.ratio == row.sigma / row.alpha
    assert (states[-1].level, states[-1].t) == (None, None)
    assert {state.plan for state in states} == {states[0].plan}
    assert states[0].plan.startswith("euler, 4 rows, ")
    assert states[0].noise == f"seed {seed}, images 0 to 1"
    offset = states_of(sampler=plan, seed=seed, sample_offset=5)[0]
    assert offset.noise == f"seed {seed}, images 5 to 6"
    assert states_of(sampler=plan, seeds=[3, 2**64 - 1])[0].noise == f"seeds 3, {2**64 - 1}"
    assert states_of(sampler=plan, generator=torch.Generator())[0].noise == "generator"
    assert states_of(sampler=plan, noise_fn=lambda stream, draw, shape: torch.zeros(shape))[0].noise == "noise_fn"


@pytest.mark.parametrize("which", ["history", "ddpm", "dpmpp_3m", "heun"])
def test_a_saved_state_goes_on_to_the_bit(seed, tmp_path, which):
    options = {"sampler": history_plan()} if which == "history" else {"sampler": which, "steps": 5}
    options["seed"] = seed
    states = states_of(**options)
    for state in states:
        path = state.save(tmp_path / f"{state.row}.safetensors")
        again = fastdiff.State.load(str(path))
        for name in ("row", "level", "plan", "noise"):
            assert getattr(again, name) == getattr(state, name)
        pairs = zip([again.x, again.x0, again.anchor, *again.slots], [state.x, state.x0, state.anchor, *state.slots],
                    strict=True)  # fmt: skip
        for a, b in pairs:
            assert (a is None) == (b is None)
            assert a is None or not assert_same_bits(a, b)
        assert_same_bits(fastdiff.sample(half, SHAPE, resume=again, **options), states[-1].x)


def test_a_state_by_hand_is_saved_too(tmp_path):
    """Tensors that share memory or are no contiguous ones, as users may make them; nothing is known of its run."""
    x = torch.rand(4, 4, 3, 2).permute(3, 2, 0, 1)
    state = fastdiff.State(x, x, None, (x[:1].expand(2, 3, 4, 4), None, None, None), 2)
    again = fastdiff.State.load(state.save(tmp_path / "s.safetensors"))
    assert torch.equal(again.x, x)
    assert torch.equal(again.slots[0], state.slots[0])
    assert (again.level, again.plan, again.noise, again.t) == (None, None, None, None)


def test_files_that_are_no_states(tmp_path):
    path = tmp_path / "a.safetensors"
    state = states_of(steps=3)[1]
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        state.save(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        state.save(tmp_path / "missing" / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors"):
        fastdiff.State.load(path)
    state.save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.safetensors is no file of safetensors"):
            fastdiff.State.load(path)
    safetensors.torch.save_file({"x": state.x}, path)
    with pytest.raises(ValueError, match="holds no state"):
        fastdiff.State.load(path)
    length = struct.unpack("<Q", whole[:8])[0]
    record = json.loads(json.loads(whole[8 : 8 + length])["__metadata__"][FORMAT])
    damages = [({"version": 2}, "version 2"), ({"row": "1"}, "row"), ({"level": {"t": 1}}, "level")]
    for change, names in damages:
        safetensors.torch.save_file({"x": state.x}, path, {FORMAT: json.dumps(record | change)})
        with pytest.raises(ValueError, match=names):
            fastdiff.State.load(path)
    safetensors.torch.save_file({"y": state.x}, path, {FORMAT: json.dumps(record)})
    with pytest.raises(ValueError, match="no x"):
        fastdiff.State.load(path)


def test_a_state_of_another_run_is_refused(seed):
    options = {"sampler": "ddim", "steps": 5, "eta": 1.0, "seed": 3}
    state = states_of(**options)[2]
    same = fastdiff.sample(half, SHAPE, resume=state, **options)
    plan = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 5, eta=1.0)
    assert_same_bits(fastdiff.sample(half, SHAPE, resume=state, sampler=plan, seed=3), same)
    for change, names in (
        ({"steps": 6}, r"its plan is 'ddim, 5 rows, \w+', this run's is 'ddim, 6 rows"),
        ({"eta": 0.5}, r"its plan is 'ddim, 5 rows, \w+', this run's is 'ddim, 5 rows"),
        ({"sampler": "euler_ancestral"}, r"this run's is 'euler_ancestral, 5 rows"),
        ({"schedule": "cosine"}, "its plan"),
        ({"seed": 4}, "its noise is 'seed 3, images 0 to 1', this run's is 'seed 4, images 0 to 1'"),
        ({"sample_offset": 1}, "this run's is 'seed 3, images 1 to 2'"),
        ({"seed": None, "seeds": [3, 5]}, "this run's is 'seeds 3, 5'"),
        ({"seed": None, "generator": torch.Generator()}, "this run's is 'generator'"),
        ({"cond_fn": lambda x, t: x}, "its plan"),
    ):
        with pytest.raises(ValueError, match=names):
            fastdiff.sample(half, SHAPE, resume=state, **{**options, **change})
    with pytest.raises(ValueError, match=r"resume.x must have shape \[4, 3, 4, 4\]; got \[2, 3, 4, 4\]"):
        fastdiff.sample(half, (4, 3, 4, 4), resume=state, **options)
    unchecked = dataclasses.replace(state, plan=None, noise=None)
    fastdiff.sample(half, SHAPE, resume=unchecked, **{**options, "seed": 4})
    several = {**options, "seed": None, "seeds": list(range(100))}
    state = next(fastdiff.sample_iter(half, (100, 3), **several))
    with pytest.raises(ValueError, match=r"its noise is 'seeds 0, 1, .{80,90}…'"):
        fastdiff.sample(half, (100, 3), resume=state, **{**several, "seeds": list(range(1, 101))})


def test_a_state_of_image_to_image_needs_its_own_levels(seed):
    """Where strength left the first levels out of the plan, the state is of that shorter plan."""
    options = {"sampler": "dpmpp_2m", "steps": 8, "seed": seed}
    states = states_of(x_init=torch.rand(SHAPE), strength=0.5, **options)
    with pytest.raises(ValueError, match="its plan is 'dpmpp_2m, 4 rows"):
        fastdiff.sample(half, SHAPE, resume=states[2], **options)
    got = fastdiff.sample(half, SHAPE, resume=states[2], sampler_options={"skip": 4}, **options)
    assert_same_bits(got, states[-1].x)


def test_x0_is_the_last_calls(seed):
    """A row of noise alone, EDM's churn, says nothing of the image."""
    options = {"sampler": "euler", "steps": 4, "seed": seed, "sampler_options": {"s_churn": 2.0}}
    plan = fastdiff.samplers.euler(fastdiff.NoiseSchedule.linear(), 4, s_churn=2.0)
    assert not plan[0].calls_model
    states = states_of(**options)
    assert states[1].x0 is None
    for before, state, row in zip(states[1:], states[2:], plan.rows[1:], strict=False):
        if row.calls_model:
            expected = row.p * before.x.double() + row.q * half(before.x * row.c_in, 0).double()
            torch.testing.assert_close(state.x0.double(), expected, rtol=1e-5, atol=1e-5)
        else:
            assert_same_bits(state.x0, before.x0)


# ---- a callback that ends the run


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_callback_may_end_the_run(seed, after):
    """StopIteration ends it there; the result is the state's x̂_0, as the image looks by then."""
    options = {"sampler": "ddpm", "steps": 5, "seed": seed}
    states = states_of(**options)
    calls, model = [], torch.nn.Identity()

    def network(x, t):
        calls.append(t)
        return half(x, t)

    def stop(state):
        if state.row == after:
            raise StopIteration

    model.forward = network
    got = fastdiff.sample(model.train(), SHAPE, callback=stop, progress=True, **options)
    assert_same_bits(got, states[after].x0)
    assert len(calls) == after
    assert model.training
    again = list(fastdiff.sample_iter(half, SHAPE, callback=stop, **options))
    assert [state.row for state in again] == list(range(after + 1))
    mixed = fastdiff.interpolate(half, torch.rand(3, 4, 4), torch.rand(3, 4, 4), [0.5], t=9, callback=stop)
    assert mixed.shape == (1, 3, 4, 4)


def test_a_callback_that_ends_a_run_of_nan():
    def stop(state):
        raise StopIteration

    with pytest.raises(FloatingPointError, match="the model returned NaN"):
        fastdiff.sample(lambda x, t: x * math.nan, SHAPE, steps=3, callback=stop)


def test_what_a_callback_returns_is_nothing(seed):
    options = {"sampler": "ddpm", "steps": 5, "seed": seed}
    whole = fastdiff.sample(half, SHAPE, **options)
    for value in (True, False, 1, "stop"):
        assert_same_bits(fastdiff.sample(half, SHAPE, callback=lambda state, value=value: value, **options), whole)
