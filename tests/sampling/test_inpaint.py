"""Inpainting: masked replacement against a float64 loop, RePaint's schedule against its pseudo code."""

import itertools
import math

import pytest
import torch
from helpers import assert_same_bits, half

import fastdiff
from fastdiff.plan.plan import Plan, Row
from fastdiff.samplers.repaint import resampled

SHAPE = (3, 2, 5, 7)
LINEAR = fastdiff.NoiseSchedule.linear()


def model(x, t):
    return torch.tanh(x) * (0.9 + t.to(x.dtype).view(-1, 1, 1, 1) / 5000)


def hole() -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, known): known on the left, half known in a column, a hole on the right."""
    mask = torch.ones(5, 7)
    mask[:, 4:] = 0
    mask[:, 3] = 0.5
    return mask, torch.rand(SHAPE) * 2 - 1


def bars_of(plan: Plan) -> list[float]:
    return [float(LINEAR.alphas_cumprod[int(t)]) for t in plan.timesteps] + [1.0]


def normal(seed, stream, draw):
    return fastdiff.randn(SHAPE, seed=seed, stream=stream, draw=draw).double()


def ddpm_step(x, m, bar, bar_p, z):
    x0 = ((x - math.sqrt(1 - bar) * m) / math.sqrt(bar)).clamp(-1, 1)
    beta = 1 - bar / bar_p
    mean = math.sqrt(bar_p) * beta / (1 - bar) * x0 + math.sqrt(1 - beta) * (1 - bar_p) / (1 - bar) * x
    return mean + math.sqrt((1 - bar_p) / (1 - bar) * beta) * z


def replaced(x, mask, known, bar, z):
    return mask * (math.sqrt(bar) * known + math.sqrt(1 - bar) * z) + (1 - mask) * x


def test_replacement_is_the_float64_loop(seed):
    mask, known = hole()
    plan = fastdiff.samplers.ddpm(LINEAR, 8, clip=1.0)
    got = fastdiff.sample(model, SHAPE, sampler=plan, seed=seed, mask=mask, known=known)
    x = normal(seed, 0, 0)
    for i, (bar, bar_p) in enumerate(itertools.pairwise(bars_of(plan))):
        x = ddpm_step(x, model(x, torch.full((3,), int(plan[i].t))), bar, bar_p, normal(seed, 1, i))
        x = replaced(x, mask.double(), known.double(), bar_p, normal(seed, 3, i))
    torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-4)
    assert_same_bits(got[..., :3], known[..., :3])
    assert float((got - fastdiff.sample(model, SHAPE, sampler=plan, seed=seed))[..., 4:].abs().max()) == 0  # pointwise


OPTIONS = [
    {"sampler": "ddim", "eta": 0.4, "steps": 7},
    {"sampler": "repaint", "steps": 9, "clip": 1.0, "sampler_options": {"jump_length": 3, "jump_n_sample": 3}},
    {"sampler": "repaint", "steps": 8, "eta": 0.0, "sampler_options": {"jump_length": 2}, "thresholding": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_backends_prefix_and_resume(simd, seed, options):
    mask, known = hole()
    arguments = {"seed": seed, "mask": mask, "known": known, **options}
    whole = fastdiff.sample(model, SHAPE, backend="native", **arguments)
    assert_same_bits(whole, fastdiff.sample(model, SHAPE, backend="reference", **arguments))
    first = {**arguments, "known": known[1:2]}
    assert_same_bits(fastdiff.sample(model, (1, *SHAPE[1:]), sample_offset=1, **first), whole[1:2])
    states = list(fastdiff.sample_iter(model, SHAPE, backend="native", **arguments))
    assert_same_bits(states[-1].x, whole)
    for state in states[1::6]:
        assert_same_bits(fastdiff.sample(model, SHAPE, resume=state, **arguments), whole)
    each = fastdiff.sample(model, SHAPE, **{**arguments, "seed": None, "seeds": [seed] * 3})
    assert_same_bits(each[:1], whole[:1])


def test_masks_of_every_shape(seed):
    mask, known = hole()
    before = mask.clone(), known.clone()
    arguments = {"steps": 4, "seed": seed, "known": known}
    whole = fastdiff.sample(half, SHAPE, mask=mask, **arguments)
    for same in (mask[None, None], mask.double(), mask.expand(SHAPE), mask.expand(3, 1, 5, 7).contiguous()):
        assert_same_bits(fastdiff.sample(half, SHAPE, mask=same, **arguments), whole)
    assert_same_bits(mask, before[0])
    assert_same_bits(known, before[1])
    binary = mask == 1
    assert_same_bits(fastdiff.sample(half, SHAPE, mask=binary, **arguments),
                     fastdiff.sample(half, SHAPE, mask=binary.half(), **arguments))  # fmt: skip
    plain = fastdiff.sample(half, SHAPE, steps=4, seed=seed)
    assert_same_bits(fastdiff.sample(half, SHAPE, mask=mask * 0, **arguments), plain)
    assert_same_bits(fastdiff.sample(half, SHAPE, mask=torch.tensor(True), **arguments), known)


def test_noise_fn_is_asked_for_the_known_images_noise(seed):
    asked = []

    def noise(stream, draw, shape):
        asked.append((stream, draw))
        return torch.full(shape, 0.25 * (stream + 1))

    plan = fastdiff.samplers.repaint(LINEAR, 3, jump_length=1, jump_n_sample=2)
    mask, known = torch.ones(SHAPE), torch.zeros(SHAPE)
    states = list(fastdiff.sample_iter(half, SHAPE, sampler=plan, noise_fn=noise, mask=mask, known=known))
    assert [row.calls_model for row in plan] == [True, False, True, True, False, True, True]
    # z, then the known image's noise; none in jumps, and no noise at all in the last row.
    expected = [(1, 0), (3, 0), (1, 1), (1, 2), (3, 2), (1, 3), (3, 3), (1, 4), (1, 5), (3, 5)]
    assert asked == [(0, 0), *expected]
    assert_same_bits(states[1].x, torch.full(SHAPE, 1.0) * torch.tensor(plan[1].sigma, dtype=torch.float32))
    drawn = [fastdiff.sample(half, SHAPE, sampler=plan, mask=mask[0], known=known, generator=torch.Generator())
             for _ in range(2)]  # fmt: skip
    assert_same_bits(*drawn)


# ---- RePaint


def pseudo_code(t_T: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The times of Lugmayr et al. 2022, Appendix (its listing of the schedule), down to −1, the image."""
    jumps = {}
    for j in range(0, t_T - jump_length, jump_length):
        jumps[j] = jump_n_sample - 1
    t, times = t_T, []
    while t >= 1:
        t = t - 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] = jumps[t] - 1
            for _ in range(jump_length):
                t = t + 1
                times.append(t)
    return [*times, -1]


SIZES = [(1, 1, 2), (2, 1, 3), (5, 1, 2), (20, 5, 3), (23, 10, 10), (50, 10, 10), (10, 10, 4), (11, 10, 4), (9, 2, 1)]


@pytest.mark.parametrize(("steps", "jump_length", "jump_n_sample"), SIZES)
@pytest.mark.parametrize("eta", [None, 0.5])
def test_the_schedule_is_the_pseudo_codes(steps, jump_length, jump_n_sample, eta):
    plan = fastdiff.samplers.repaint(LINEAR, steps, jump_length=jump_length, jump_n_sample=jump_n_sample, eta=eta)
    base = fastdiff.samplers.ddpm(LINEAR, steps) if eta is None else fastdiff.samplers.ddim(LINEAR, steps, eta=eta)
    bars = list(reversed(bars_of(base)[:-1]))
    rows, betas = iter(plan), [1 - b / a for a, b in itertools.pairwise([1.0, *bars])]
    alpha, beta_sum, ups = 1.0, 0.0, 0
    for last, now in itertools.pairwise(pseudo_code(steps, jump_length, jump_n_sample)):
        if now > last:  # x ← √(1 − β) x + √β z, jump_length times
            alpha *= math.sqrt(1 - betas[now])
            beta_sum = beta_sum * (1 - betas[now]) + betas[now]
            ups += 1
            continue
        if ups:
            jump = next(rows)
            assert ups == jump_length
            assert not jump.calls_model
            assert set(jump.x) == {"x", "z"}
            assert jump.x["x"] == pytest.approx(alpha, rel=1e-12)
            assert jump.x["z"] ** 2 == pytest.approx(beta_sum, rel=1e-9)
            assert jump.alpha == pytest.approx(math.sqrt(bars[last - ups]))
            alpha, beta_sum, ups = 1.0, 0.0, 0
        assert next(rows) == base[steps - 1 - last]
    assert next(rows, None) is None
    assert plan.name == "repaint"


def test_the_schedule_is_diffusers(seed):
    scheduler = pytest.importorskip("diffusers").RePaintScheduler()
    for steps, length, count in SIZES:
        scheduler.set_timesteps(steps, length, count)
        mine = fastdiff.samplers.repaint(LINEAR, steps, jump_length=length, jump_n_sample=count)
        times = scheduler.timesteps.tolist()
        calls = [t for t, after in itertools.pairwise([*times, -1]) if after < t]
        assert [row.t for row in mine if row.calls_model] == calls


def test_a_run_is_algorithm_1(seed):
    """Lugmayr et al. 2022, Algorithm 1 with jumps: known where it is known, after steps down and not after jumps up."""
    mask, known = hole()
    steps, length, count = 8, 3, 3
    got = fastdiff.sample(
        model, SHAPE, sampler="repaint", steps=steps, clip=1.0, seed=seed, mask=mask, known=known,
        sampler_options={"jump_length": length, "jump_n_sample": count},
    )  # fmt: skip
    ts = [int(t) for t in fastdiff.samplers.ddpm(LINEAR, steps).timesteps][::-1]
    bars = [float(LINEAR.alphas_cumprod[t]) for t in ts] + [1.0]  # bars[-1]: the image
    x, draw, goal = normal(seed, 0, 0), 0, None
    for last, now in itertools.pairwise(pseudo_code(steps, length, count)):
        if now > last:
            goal = last if goal is None else goal
            if now == goal + length:
                ratio = bars[now] / bars[goal]
                x = math.sqrt(ratio) * x + math.sqrt(1 - ratio) * normal(seed, 1, draw)
                draw, goal = draw + 1, None
            continue
        x = ddpm_step(x, model(x, torch.full((3,), ts[last])), bars[last], bars[now], normal(seed, 1, draw))
        x = replaced(x, mask.double(), known.double(), bars[now], normal(seed, 3, draw))
        draw += 1
    torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-4)


def test_resampling_other_plans(seed):
    """Any plan of single steps: here states x_0 + σ ε and a network that is shown c_in·x."""
    base = fastdiff.samplers.ddim(fastdiff.EDMSchedule(), 6, prediction="sample", spacing=None)
    plan = resampled(base, 2, 2)
    assert len(plan) > len(base)
    for before, row in itertools.pairwise(plan):
        if not before.calls_model:  # the level that the jump reaches is the next row's
            assert (before.x["x"] * before.sigma) ** 2 + before.x["z"] ** 2 == pytest.approx(row.sigma**2)
    shown = []

    def watch(x, t):
        shown.append(x.clone())
        return x * 0.5

    states = list(fastdiff.sample_iter(watch, SHAPE, sampler=plan, seed=seed))
    inputs = iter(shown[1:])
    for state, row in zip(states[1:], plan.rows[1:], strict=False):
        if row.calls_model:
            torch.testing.assert_close(next(inputs), state.x * row.c_in)


def test_learned_variance(seed):
    def network(x, t):
        return torch.cat([model(x, t), torch.tanh(x)], dim=1)

    options = {"sampler": "repaint", "steps": 6, "variance": "learned_range", "seed": seed,
               "sampler_options": {"jump_length": 2, "jump_n_sample": 2}}  # fmt: skip
    a, b = (fastdiff.sample(network, SHAPE, backend=which, **options) for which in ("native", "reference"))
    assert_same_bits(a, b)


def test_one_sample_is_no_resampling():
    base = fastdiff.samplers.ddpm(LINEAR, 9)
    assert resampled(base, 3, 1).rows == base.rows


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"mask": None}, ValueError, "mask and known"),
        ({"known": None}, ValueError, "mask and known"),
        ({"mask": 0.5}, TypeError, "mask must be a tensor"),
        ({"mask": torch.ones(SHAPE, dtype=torch.int64)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(2, 7)}, ValueError, "mask must broadcast"),
        ({"mask": torch.ones(1, *SHAPE)}, ValueError, "mask must broadcast"),
        ({"mask": torch.full(SHAPE, 1.5)}, ValueError, "mask must lie"),
        ({"mask": torch.full(SHAPE, math.nan)}, ValueError, "mask must lie"),
        ({"known": torch.zeros(SHAPE[1:])}, ValueError, "known must have shape"),
        ({"known": torch.zeros(SHAPE, dtype=torch.uint8)}, TypeError, "known must be a floating"),
        ({"known": torch.full(SHAPE, math.inf)}, ValueError, "known must be finite"),
        ({"known": [0.0]}, TypeError, "known must be a tensor"),
        ({"sampler_options": {"jump_length": 0}}, ValueError, "jump_length"),
        ({"sampler_options": {"jump_n_sample": 1.5}}, TypeError, "jump_n_sample"),
        ({"eta": 0.5, "variance": "fixed_large"}, ValueError, "eta"),
    ],
)
def test_refuses(options, error, names):
    def never(x, t):
        raise AssertionError("called")

    arguments = {"mask": torch.ones(SHAPE), "known": torch.zeros(SHAPE), "sampler": "repaint", "steps": 4, **options}
    with pytest.raises(error, match=names):
        fastdiff.sample(never, SHAPE, **arguments)


def test_resampling_refuses_plans_with_a_history():
    row = Row(t=5, alpha=0.5, sigma=0.8, x={"x": 1.0}, p=1.0)
    for other in (Row(t=5, alpha=0.5, sigma=0.8, x={"x": 1.0}, slot={"x": 1.0}, write=0),
                  Row(t=5, alpha=0.5, sigma=0.8, x={"x": 1.0}, anchor={"x": 1.0}),
                  Row(t=5, alpha=0.5, sigma=0.8, x={"x": 1.0}, calls_model=False)):  # fmt: skip
        with pytest.raises(ValueError, match="one step each"):
            resampled(Plan((row, other)))


def test_an_inversion_takes_no_mask():
    """Its last row would put the clean known image into noise."""
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="'ddim_inverse' leads to noise"):
        fastdiff.sample(
            lambda x, t: x, x.shape, sampler="ddim_inverse", steps=4, x_init=x, mask=torch.ones(4, 4) == 1, known=x
        )
