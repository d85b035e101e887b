"""RePaint: its schedule against its pseudo code, a run against its algorithm, and resampling of other plans."""

import itertools
import math

import pytest
import torch
from helpers import assert_same_bits
from inpaint_cases import LINEAR, SHAPE, bars_of, ddpm_step, hole, model, normal, replaced

import fastdiff
from fastdiff.plan.plan import Plan, Row
from fastdiff.samplers.repaint import resampled


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


def test_resampling_refuses_plans_with_a_history():
    row = Row(t=5, alpha=0.5, sigma=0.8, x={"x": 1.0}, p=1.0)
    for other in (Row(t=5, alpha=0.5, sigma=0.8, x={"x": 1.0}, slot={"x": 1.0}, write=0),
                  Row(t=5, alpha=0.5, sigma=0.8, x={"x": 1.0}, anchor={"x": 1.0}),
                  Row(t=5, alpha=0.5, sigma=0.8, x={"x": 1.0}, calls_model=False)):  # fmt: skip
        with pytest.raises(ValueError, match="one step each"):
            resampled(Plan((row, other)))
