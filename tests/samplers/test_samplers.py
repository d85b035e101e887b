"""DDPM and DDIM against independent float64 formulas, published identities and diffusers' stored numbers."""

import itertools
import math

import pytest
import torch
from helpers import dummy, dummy_sample, planned
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule, samplers
from fastdiff.plan.plan import Plan
from fastdiff.schedules.timesteps import select

LINEAR = NoiseSchedule.linear()
PREDICTIONS = ("epsilon", "v_prediction", "sample")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def bar_at(schedule: NoiseSchedule, t: int | None) -> float:
    return 1.0 if t is None else float(schedule.alphas_cumprod[t])


def predicted(prediction: str, x: Tensor, m: Tensor, bar: float) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε) of a network's output."""
    a, s = math.sqrt(bar), math.sqrt(1 - bar)
    if prediction == "epsilon":
        return (x - s * m) / a, m
    if prediction == "v_prediction":
        return a * x - s * m, s * x + a * m
    return m, (x - a * m) / s


def ddpm_formula(schedule, x, m, v, z, t, t_next, prediction, variance, clip):
    """One step as the posterior q(x_p | x_t, x̂_0) is derived: two Gaussians multiplied."""
    bar, bar_p = bar_at(schedule, t), bar_at(schedule, t_next)
    x0, _ = predicted(prediction, x, m, bar)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    if t_next is None:
        return x0  # the posterior of x_0 given x_0
    alpha = bar / bar_p
    precision = alpha / (1 - alpha) + 1 / (1 - bar_p)
    mean = (math.sqrt(alpha) / (1 - alpha) * x + math.sqrt(bar_p) / (1 - bar_p) * x0) / precision
    small, large = 1 / precision, 1 - alpha
    if variance == "learned":
        return mean + z * v.exp().sqrt()
    if variance == "learned_range":
        f = (v + 1) / 2
        return mean + z * (f * math.log(large) + (1 - f) * math.log(small)).exp().sqrt()
    return mean + z * math.sqrt(small if variance == "fixed_small" else large)


def ddim_formula(schedule, x, m, z, t, t_next, prediction, eta, clip, from_clipped=False):
    bar, bar_p = bar_at(schedule, t), bar_at(schedule, t_next)
    x0, epsilon = predicted(prediction, x, m, bar)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    if from_clipped:
        epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
    sigma = eta * math.sqrt((1 - bar_p) / (1 - bar) * (1 - bar / bar_p))
    return math.sqrt(bar_p) * x0 + math.sqrt(1 - bar_p - sigma**2) * epsilon + sigma * z


def rows_of(plan: Plan) -> list[int]:
    return sorted({0, 1, len(plan) // 2, len(plan) - 2, len(plan) - 1} & set(range(len(plan))))


def data(*, channels: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, channels, 4, 4, dtype=torch.float64) for _ in range(4))


GRIDS = [(None, "leading"), (50, "leading"), (7, "leading"), (1, "leading"), (50, "trailing"), (7, "trailing"),
         (13, "linspace"), (1000, "linspace"), (1, "trailing"), (333, "trailing")]  # fmt: skip


@pytest.mark.parametrize(("steps", "spacing"), GRIDS)
@pytest.mark.parametrize("variance", [*VARIANCES, "learned"])
def test_ddpm_is_the_posterior(seed, variance, steps, spacing):
    for prediction, clip in itertools.product(PREDICTIONS, (None, 1.0)):
        plan = samplers.ddpm(LINEAR, steps, prediction=prediction, clip=clip, spacing=spacing, variance=variance)
        ts = [int(t) for t in plan.timesteps]
        for i in rows_of(plan):
            x, m, v, z = data()
            t_next = ts[i + 1] if i + 1 < len(ts) else None
            output = torch.cat([m, v], dim=1).float() if variance.startswith("learned") else m.float()
            m, v = m.float().double(), v.float().double()
            got = fastdiff.ops.update(x, output, plan, i, noise=z).x
            exact = ddpm_formula(LINEAR, x, m, v, z, ts[i], t_next, prediction, variance, clip)
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max() + 1))


@pytest.mark.parametrize(("steps", "spacing"), GRIDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_its_equation(seed, eta, steps, spacing):
    for prediction, clip, from_clipped in itertools.product(PREDICTIONS, (None, 1.0), (False, True)):
        options = {"prediction": prediction, "clip": clip, "eta": eta, "use_clipped_model_output": from_clipped}
        plan = samplers.ddim(LINEAR, steps, spacing=spacing, **options)
        ts = [int(t) for t in plan.timesteps]
        for i in rows_of(plan):
            x, m, z, _ = data()
            m = m.float()
            t_next = ts[i + 1] if i + 1 < len(ts) else None
            got = fastdiff.ops.update(x, m, plan, i, noise=z).x
            exact = ddim_formula(LINEAR, x, m.double(), z, ts[i], t_next, prediction, eta, clip, from_clipped)
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max() + 1))


# ---- timesteps


def test_spacings():
    """Lin et al. 2024, Table 2: T = 1000, 10 steps (there counted from 1)."""
    assert select(len(LINEAR), 10, "leading") == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert select(len(LINEAR), 10, "trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert select(len(LINEAR), 10, "linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    for spacing in ("leading", "trailing", "linspace"):
        assert select(len(LINEAR), None, spacing) == list(range(999, -1, -1))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_number_of_steps(spacing):
    T = 60
    schedule = NoiseSchedule.linear(T)
    for steps in range(1, T + 1):
        chosen = select(len(schedule), steps, spacing)
        assert len(chosen) == steps
        assert all(a > b for a, b in itertools.pairwise(chosen))
        assert chosen[0] < T
        assert chosen[-1] >= 0
        assert chosen[0] == T - 1 or spacing == "leading" or (spacing == "linspace" and steps == 1)
        assert chosen[-1] == 0 or spacing == "trailing"


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_same_timesteps_as_diffusers(spacing):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    for steps in (1, 2, 3, 7, 10, 50, 333, 999, 1000):
        if spacing == "linspace" and steps == 1:
            continue  # theirs is t = 0, ours too; numpy's linspace warns
        scheduler.set_timesteps(steps)
        assert select(len(LINEAR), steps, spacing) == scheduler.timesteps.tolist(), steps


def test_listed_timesteps():
    for name in ("ddpm", "ddim"):
        plan = planned(getattr(samplers, name), LINEAR, timesteps=(900, 37, 5))
        assert plan.timesteps == (900, 37, 5)
        # Every row starts at the level where the one before it ended.
        for row in plan:
            assert row.alpha == pytest.approx(math.sqrt(LINEAR.alphas_cumprod[int(row.t)]))
            assert row.alpha**2 + row.sigma**2 == pytest.approx(1)
    for bad in ((), (5, 5), (5, 6), (1000, 3), (3, -1)):
        with pytest.raises(ValueError, match="timesteps"):
            planned(samplers.ddpm, LINEAR, timesteps=bad)
    with pytest.raises(ValueError, match="steps"):
        planned(samplers.ddim, LINEAR, 4, timesteps=(3, 2))


# ---- identities


@pytest.mark.parametrize("T", [20, 1000])
def test_ddim_with_full_noise_is_ddpm(seed, T):
    """DDIM(η = 1, every step, ε from the clipped x̂_0) and DDPM with the small variance have the same rows."""
    schedule = NoiseSchedule.linear(T)
    a = samplers.ddim(schedule, T, eta=1.0, clip=1.0, use_clipped_model_output=True)
    b = samplers.ddpm(schedule, clip=1.0)
    assert a.timesteps == b.timesteps
    for i in range(T):
        assert (a[i].p, a[i].q, a[i].clip) == (b[i].p, b[i].q, b[i].clip)
        for term in ("x", "x0", "m", "z"):
            assert a[i].x.get(term, 0) == pytest.approx(b[i].x.get(term, 0), rel=1e-9, abs=1e-11), (i, term)


@pytest.mark.parametrize("variance", VARIANCES)
def test_no_noise_in_the_last_row(variance):
    for spacing, steps in itertools.product(("leading", "trailing", "linspace"), (1, 3, None)):
        plan = samplers.ddpm(LINEAR, steps, spacing=spacing, variance=variance)
        assert not plan[-1].uses("z")
        assert all(row.uses("z") for row in plan.rows[:-1])
    plan = samplers.ddim(LINEAR, 10, eta=1.0)
    assert not plan[-1].uses("z")
    assert all(row.x["z"] > 0 for row in plan.rows[:-1])


def test_eta_zero_reads_no_noise():
    assert not any(row.uses("z") for row in samplers.ddim(LINEAR, 50))


def test_learned_variance_lies_between_the_fixed_ones(seed):
    small, large, learned = (samplers.ddpm(LINEAR, 20, variance=v) for v in VARIANCES)
    assert learned.learned_variance
    for a, b, c in list(zip(small, large, learned, strict=True))[:-1]:
        assert c.log_variance == pytest.approx((2 * math.log(a.x["z"]), 2 * math.log(b.x["z"])))
        assert c.log_variance[0] < c.log_variance[1]


def test_perfect_predictions_give_the_image_back(seed):
    """With the true ε every deterministic row lands on the true path, whatever the steps."""
    x0, epsilon = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4).double()
    for steps, spacing in GRIDS:
        plan = samplers.ddim(LINEAR, steps, spacing=spacing)
        x = x0 * plan[0].alpha + epsilon * plan[0].sigma
        for i in range(len(plan)):
            out = fastdiff.ops.update(x, epsilon, plan, i, return_x0=True)
            x = out.x
            torch.testing.assert_close(out.x0, x0, rtol=0, atol=1e-9)
        torch.testing.assert_close(x, x0, rtol=0, atol=1e-9)


def test_zero_terminal_snr(seed):
    """ᾱ = 0 at the first row: v and sample predictions work, ε has nothing to say."""
    schedule = LINEAR.rescale_zero_terminal_snr()
    for sampler, prediction in itertools.product((samplers.ddpm, samplers.ddim), ("v_prediction", "sample")):
        plan = sampler(schedule, 5, prediction=prediction, spacing="trailing")
        assert all(math.isfinite(c) for row in plan for c in row.x.values())
        x, m = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3)
        got = fastdiff.ops.update(x, m, plan, 0, return_x0=True, noise=torch.zeros_like(x))
        torch.testing.assert_close(got.x0, -m.double() if prediction == "v_prediction" else m.double())
    for sampler in (samplers.ddpm, samplers.ddim):
        with pytest.raises(ValueError, match="ᾱ is 0"):
            sampler(schedule, 5, spacing="trailing")


# ---- diffusers' stored numbers


@pytest.mark.parametrize(
    ("sampler", "steps", "prediction", "expected"),
    [
        ("ddpm", None, "epsilon", 258.9606),
        ("ddpm", None, "v_prediction", 202.0296),
        ("ddim", 10, "epsilon", 172.0067),
        ("ddim", 10, "v_prediction", 52.5302),
    ],
)
def test_stored_numbers(sampler, steps, prediction, expected):
    generator = torch.manual_seed(0)
    x = dummy_sample()
    got = fastdiff.sample(
        dummy, x.shape, sampler=sampler, steps=steps, prediction=prediction, clip=1.0,
        noise_fn=lambda stream, draw, shape: torch.randn(shape, generator=generator),
        x_T=x,
    )  # fmt: skip
    assert float(got.abs().sum()) == pytest.approx(expected, abs=1e-2)


# ---- what they refuse


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 1001}, ValueError, "steps"),
        ({"steps": 1.5}, TypeError, "steps"),
        ({"steps": True}, TypeError, "steps"),
        ({"prediction": "noise"}, ValueError, "prediction"),
        ({"spacing": "carras"}, ValueError, "spacing.*did you mean 'karras'"),
        ({"clip": 0.0}, ValueError, "clip"),
        ({"clip": -1.0}, ValueError, "clip"),
        ({"clip": math.nan}, ValueError, "clip"),
        ({"clip": True}, TypeError, "clip"),
        ({"clip": "1"}, TypeError, "clip"),
        ({"timesteps": 5}, TypeError, "timesteps"),
        ({"timesteps": ("5",)}, TypeError, "timesteps"),
        ({"spacing": "carras", "timesteps": (5,)}, ValueError, "spacing"),
    ],
)
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_refuses(name, arguments, error, names):
    with pytest.raises(error, match=names):
        planned(getattr(samplers, name), LINEAR, **arguments)


def test_refuses_its_own():
    for eta, error in ((1.5, ValueError), (-0.1, ValueError), (math.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="eta"):
            samplers.ddim(LINEAR, eta=eta)
    with pytest.raises(ValueError, match="variance"):
        samplers.ddpm(LINEAR, variance="fixed_small_log")
    for sampler in (samplers.ddpm, samplers.ddim):
        with pytest.raises(TypeError, match="schedule"):
            sampler("linear")
