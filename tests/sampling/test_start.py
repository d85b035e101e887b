"""Where a run begins: image-to-image by strength, in plans of one row a step, of several, and with a history."""

import math

import pytest
import torch
from helpers import assert_same_bits, half, spaced

import fastdiff
from fastdiff.plan.plan import Plan, Row
from fastdiff.samplers import SAMPLERS
from fastdiff.sampling.stepper import State

SHAPE = (2, 3, 4, 4)
IMAGES = (4, 3, 8, 8)
LINEAR = fastdiff.NoiseSchedule.linear()


def first_of(steps: int, strength: float) -> int:
    """diffusers' get_timesteps: the first of the timesteps that an img2img pipeline visits."""
    init_timestep = min(int(steps * strength), steps)
    return max(steps - init_timestep, 0)


def heun(schedule, steps=None, *, churn=False, **walk) -> Plan:
    """Two calls a level, or a row of noise before them; the first row of a level reads nothing of the one before."""
    rows = []
    *visited, end = spaced(schedule, steps, ve=True, **walk)
    for here, there in zip(visited, [*visited[1:], end], strict=True):
        at = {"t": here.t, "alpha": 1.0, "sigma": here.sigma, "c_in": here.c_in}
        if churn and there.sigma:
            rows.append(Row(x={"x": 1.0, "z": 0.1}, calls_model=False, **at))
        ratio = there.sigma / here.sigma
        step = {"x": ratio, "x0": 1 - ratio}
        rows.append(Row(x=step, anchor={"x": 1.0}, slot={"x0": 1.0}, write=0, q=1.0, **at))
        if there.sigma:
            both = {"anchor": ratio, "x0": (1 - ratio) / 2, "slot0": (1 - ratio) / 2}
            rows.append(Row(t=there.t, alpha=1.0, sigma=there.sigma, c_in=there.c_in, x=both, q=1.0, reads=(0,)))
    return Plan(tuple(rows), name="heun", init_sigma=visited[0].sigma)


def multistep(schedule, steps=None, **walk) -> Plan:
    """x̂_0 extrapolated from the last two, but for the first row."""
    rows = []
    *visited, end = spaced(schedule, steps, ve=True, **walk)
    for i, (here, there) in enumerate(zip(visited, [*visited[1:], end], strict=True)):
        ratio = there.sigma / here.sigma
        x = {"x": ratio, "x0": (1 - ratio) * (1.5 if i else 1.0), "slot0": (1 - ratio) * (-0.5 if i else 0.0)}
        rows.append(
            Row(t=here.t, alpha=1.0, sigma=here.sigma, c_in=here.c_in, x=x, slot={"x0": 1.0}, write=i % 2,
                reads=((i + 1) % 2,), q=1.0)
        )  # fmt: skip
    return Plan(tuple(rows), name="multistep", init_sigma=visited[0].sigma)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("strength", [0.1, 0.29, 0.5, 0.75, 0.999, 1.0])
def test_strength_is_a_start_step(seed, sampler, strength):
    image = torch.rand(SHAPE)
    for steps in (10, 13):
        options = {"sampler": sampler, "steps": steps, "x_init": image, "seed": seed}
        got = fastdiff.sample(half, SHAPE, strength=strength, **options)
        assert_same_bits(got, fastdiff.sample(half, SHAPE, start_step=first_of(steps, strength), **options))
        plan = getattr(fastdiff.samplers, sampler)(LINEAR, steps)
        assert_same_bits(got, fastdiff.sample(half, SHAPE, sampler=plan, x_init=image, seed=seed, strength=strength))
        calls = list(fastdiff.sample_iter(half, SHAPE, strength=strength, **options))
        assert len(calls) == int(steps * strength) + 1  # and the state before the first


def test_strength_zero_is_the_image(seed):
    image = torch.rand(SHAPE, dtype=torch.float64)
    for strength in (0, 0.0, 0.05):
        got = fastdiff.sample(half, SHAPE, steps=10, x_init=image, strength=strength)
        assert_same_bits(got, image.float())
    kept = image.float()
    assert fastdiff.sample(half, SHAPE, steps=10, x_init=kept, strength=0).data_ptr() != kept.data_ptr()


@pytest.mark.parametrize("churn", [False, True])
def test_a_step_of_several_rows(seed, monkeypatch, churn):
    monkeypatch.setitem(SAMPLERS, "heun of the test", heun)
    image, steps = torch.rand(SHAPE), 10
    plan = heun(LINEAR, steps, churn=churn)
    sigmas = [level.sigma for level in spaced(LINEAR, steps, ve=True)]
    for strength in (0.25, 0.6, 0.1):
        seen = []

        def watch(x, t, seen=seen):
            seen.append(int(t[0]))
            return x * 0.5

        got = fastdiff.sample(watch, SHAPE, sampler="heun of the test", steps=steps, sampler_options={"churn": churn},
                              x_init=image, strength=strength, seed=seed)  # fmt: skip
        first = (3 if churn else 2) * first_of(steps, strength)
        assert plan[first].sigma == sigmas[first_of(steps, strength)]
        assert_same_bits(got, fastdiff.sample(half, SHAPE, sampler=plan, x_init=image, start_step=first, seed=seed))
        assert len(seen) == 2 * int(steps * strength) - 1
    with pytest.raises(ValueError, match="start_step is 2" if churn else "start_step is 1"):
        fastdiff.sample(half, SHAPE, sampler=plan, x_init=image, start_step=2 if churn else 1)
    with pytest.raises(ValueError, match="strength"):
        fastdiff.sample(half, SHAPE, sampler=plan, x_init=image, strength=0.5)


def test_a_sampler_with_a_history_begins_anew(seed, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "multistep of the test", multistep)
    image = torch.rand(SHAPE)
    plan = multistep(LINEAR, 10)
    assert plan.entries == (0, 9) or plan.entries == (0,)
    got = fastdiff.sample(
        half, SHAPE, sampler="multistep of the test", steps=10, x_init=image, strength=0.45, seed=seed
    )
    # By hand: the last four levels, the first without a history.
    sigmas = [level.sigma for level in spaced(LINEAR, 10, ve=True)][6:]
    c_in = [level.c_in for level in spaced(LINEAR, 10, ve=True)][6:]
    x = image.double() + sigmas[0] * fastdiff.randn(SHAPE, seed=seed).double()
    old = None
    for a, b, c in zip(sigmas, sigmas[1:], c_in, strict=False):
        x0 = 0.5 * c * x
        x = b / a * x + (1 - b / a) * (x0 if old is None else 1.5 * x0 - 0.5 * old)
        old = x0
    torch.testing.assert_close(got.double(), x, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="start_step is 6"):
        fastdiff.sample(half, SHAPE, sampler=plan, x_init=image, start_step=6)
    with pytest.raises(ValueError, match="skip"):
        fastdiff.sample(half, SHAPE, sampler="multistep of the test", steps=10, x_init=image, strength=0.5,
                        sampler_options={"skip": 2})  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"strength": 1.1}, ValueError, "strength"),
        ({"strength": -0.1}, ValueError, "strength"),
        ({"strength": math.nan}, ValueError, "strength"),
        ({"strength": "0.5"}, TypeError, "strength"),
        ({"strength": True}, TypeError, "strength"),
        ({"strength": 0.5, "start_step": 2}, ValueError, "start_step"),
        ({"strength": 0.5, "x_init": None}, ValueError, "x_init"),
        ({"start_step": 2, "x_init": None}, ValueError, "x_init"),
        ({"x_init": torch.zeros(2, 3), "strength": 0.0}, ValueError, "x_init"),
    ],
)
def test_refuses(options, error, names):
    def never(x, t):
        raise AssertionError("called")

    with pytest.raises(error, match=names):
        fastdiff.sample(never, SHAPE, **{"steps": 5, "x_init": torch.zeros(SHAPE), **options})


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])  # which begins in the plan's middle, or has another plan
def test_resume_with_strength(sampler, seed):
    options = {"sampler": sampler, "steps": 6, "strength": 0.5, "seed": seed}
    states = list(fastdiff.sample_iter(half, SHAPE, x_init=torch.ones(SHAPE), **options))
    for state in states[:-1]:
        assert_same_bits(fastdiff.sample(half, SHAPE, resume=state, **options), states[-1].x)


def test_resume_before_the_first_row_of_strength():
    state = next(iter(fastdiff.sample_iter(half, SHAPE, steps=5)))
    with pytest.raises(ValueError, match="resume stands at row 0, before the first one of strength"):
        fastdiff.sample(half, SHAPE, steps=5, resume=state, strength=0.5)


# ---- x_T: the first state itself


HISTORY = ("lms", "pndm", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "dpmpp_2m_sde", "heun", "dpmpp_2s")


def test_x_T_is_the_first_state(seed, backend):
    """Noise given by hand is the noise that is drawn; stream 0 is then not drawn, and the tensor is left alone."""
    z, asked = fastdiff.randn(SHAPE, seed=seed), []

    def noise(stream, draw, shape):
        asked.append(stream)
        return torch.ones(shape)

    options = {"sampler": "ddpm", "steps": 5, "backend": backend}
    given = z.clone()
    got = fastdiff.sample(half, SHAPE, x_T=given, seed=seed, **options)
    assert_same_bits(got, fastdiff.sample(half, SHAPE, seed=seed, **options))
    assert_same_bits(given, z)
    assert_same_bits(fastdiff.sample(half, SHAPE, x_T=z.double(), seed=seed, **options), got)
    fastdiff.sample(half, SHAPE, x_T=z, noise_fn=noise, **options)
    assert asked == [1] * 4
    states = list(fastdiff.sample_iter(half, SHAPE, x_T=z, seed=seed, **options))
    assert_same_bits(states[0].x, z)
    assert (states[0].row, states[0].x0) == (0, None)


@pytest.mark.parametrize("sampler", HISTORY)
def test_inversion_is_where_any_sampler_starts(seed, sampler):
    """Inverted, an image is x_T for samplers with a history, too; each leads back near it."""
    image = torch.rand(SHAPE) - 0.5

    def network(x, t):
        bar = LINEAR.alphas_cumprod.float()[t.long()].view(-1, 1, 1, 1) if not t.is_floating_point() else 0.5
        return x * (1 - bar) ** 0.5 * 0.5

    latents = fastdiff.sample(network, SHAPE, sampler="ddim_inverse", steps=20, x_init=image, spacing="trailing")
    plan = SAMPLERS[sampler](LINEAR, 20, spacing="trailing")
    x_T = latents * plan[0].alpha if plan[0].alpha != 1 else latents * plan.init_sigma
    first = next(fastdiff.sample_iter(network, SHAPE, sampler=plan, x_T=latents))
    assert_same_bits(first.x, latents)
    assert bool(fastdiff.sample(network, SHAPE, sampler=plan, x_T=x_T, seed=seed).isfinite().all())


def test_x_T_at_any_entry_row(seed):
    """From a row of ``Plan.entries`` on, the state there is all that the rows need."""
    plan = SAMPLERS["heun"](LINEAR, 6)
    states = list(fastdiff.sample_iter(half, SHAPE, sampler=plan, seed=seed))
    for row in plan.entries:
        got = fastdiff.sample(half, SHAPE, sampler=plan, x_T=states[row].x, start_step=row, seed=seed)
        assert_same_bits(got, states[-1].x)
    inside = next(i for i in range(len(plan)) if i not in plan.entries)
    with pytest.raises(ValueError, match="start_step"):
        fastdiff.sample(half, SHAPE, sampler=plan, x_T=states[0].x, start_step=inside)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"x_T": torch.zeros(2, 3, 4, 5)}, ValueError, "x_T must have shape"),
        ({"x_T": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x_T"),
        ({"x_T": torch.full(SHAPE, math.nan)}, ValueError, "x_T must be finite"),
        ({"x_T": [0.0]}, TypeError, "x_T"),
        ({"x_T": torch.zeros(SHAPE), "x_init": torch.zeros(SHAPE)}, ValueError, "x_T"),
        ({"x_T": torch.zeros(SHAPE), "strength": 0.5}, ValueError, "x_T"),
        ({"x_init": torch.full(SHAPE, math.inf)}, ValueError, "x_init must be finite"),
    ],
)
def test_refuses_a_first_state(options, error, names):
    with pytest.raises(error, match=names):
        fastdiff.sample(half, SHAPE, steps=5, **options)


# ---- x_init at any row


def test_an_image_to_start_from(seed):
    plan = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 10)
    image, seen = torch.rand(IMAGES) * 2 - 1, []

    def model(x, t):
        seen.append((x.clone(), t.clone()))
        return x * 0.5

    for start in (0, 3, 9):
        seen.clear()
        got = fastdiff.sample(model, IMAGES, sampler=plan, x_init=image, start_step=start, seed=seed)
        assert len(seen) == 10 - start
        assert set(seen[0][1].tolist()) == {plan[start].t}
        row, z = plan[start], fastdiff.randn(IMAGES, seed=seed, stream=0)
        bar = fastdiff.NoiseSchedule.linear().alphas_cumprod[int(row.t)]
        expected = bar.sqrt() * image.double() + (1 - bar).sqrt() * z.double()
        torch.testing.assert_close(seen[0][0].double(), expected, rtol=0, atol=1e-6)
        state = State(seen[0][0], None, None, (None,) * 4, start)
        assert_same_bits(got, fastdiff.sample(half, IMAGES, sampler=plan, resume=state, seed=seed))
    half_image = fastdiff.sample(half, IMAGES, sampler=plan, x_init=image.half(), start_step=9)
    assert half_image.dtype == torch.float32


def test_init_sigma():
    plan = Plan((Row(t=0, alpha=1, sigma=80, x={"x": 1.0}),), init_sigma=80.0)
    assert_same_bits(fastdiff.sample(half, IMAGES, sampler=plan, seed=3), fastdiff.randn(IMAGES, seed=3) * 80 + 0.0)
