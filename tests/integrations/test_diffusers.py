"""Our schedulers' numbers beside diffusers' own: single steps from the same x, whole runs, and where they differ."""

import math

import pytest
import torch
from helpers import dummy

pytest.importorskip("diffusers")
import diffusers
from schedulers import APART, SHAPE, cases, difference, pair, start_of

import fastdiff
import fastdiff.integrations.diffusers as ours

CASES = list(cases())
NAMES = [name for name in ours.SCHEDULERS if name not in APART]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_single_steps(seed, name):
    """Every option, with diffusers' own float32 numbers held in float64: what is left is the arithmetic."""
    wrong = []
    for case_name, config, steps, options in CASES:
        if case_name == name:
            theirs, mine = pair(name, config, steps)
            error = difference(theirs, mine, options, seed=seed)
            if not error <= 1e-5:
                wrong.append((config, steps, options, error))
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_single_steps_of_the_stock_scheduler(seed, name):
    theirs, mine = pair(name, widen=False)
    # 1 − ᾱ of t = 0 is 1e-4, which float32 knows to 6e-4·1e-4: those schedulers divide by it.
    assert difference(theirs, mine, seed=seed) <= (
        1e-4 if name in ("LMSDiscreteScheduler", "DEISMultistepScheduler") else 1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_whole_runs_of_the_dummy_model(seed, name):
    config = {"sigma_max": 5.0} if name == "EDMEulerScheduler" else {}
    theirs, mine = pair(name, config, 10)
    scale = 1 / 1000 if name == "FlowMatchEulerDiscreteScheduler" else 1

    def network(x, t):
        return dummy(x, t * scale)

    assert difference(theirs, mine, seed=seed, network=network) <= 1e-5 * len(mine.timesteps)


# ---- runs that begin in the middle of the list (image to image)

MIDDLE = [n for n in NAMES if n not in ("DDIMInverseScheduler", "PNDMScheduler", "LMSDiscreteScheduler")]


@pytest.mark.parametrize("name", MIDDLE)
@pytest.mark.parametrize("start", [2, 4])
@pytest.mark.slow
def test_runs_from_the_middle(seed, name, start):
    for config in ({}, {"solver_order": 3} if "solver_order" in getattr(ours, name)().config else {}):
        theirs, mine = pair(name, config)
        assert difference(theirs, mine, start=start, seed=seed) <= 1e-5


def test_lms_from_the_middle_is_lms_on_the_rest(seed):
    theirs, mine = pair("LMSDiscreteScheduler")
    theirs.timesteps, theirs.sigmas = theirs.timesteps[4:], theirs.sigmas[4:]
    mine.set_begin_index(4)
    generator = torch.Generator().manual_seed(seed)
    x = start_of(theirs, generator)
    for i, t in enumerate(theirs.timesteps):
        theirs.scale_model_input(x, t)
        output = torch.randn(SHAPE, generator=generator)
        expected = theirs.step(output, t, x).prev_sample
        assert float((mine.step(output, mine.timesteps[4 + i], x).prev_sample - expected).abs().max()) <= 1e-5 * 20
        x = expected


def test_pndm_from_the_middle_is_a_multistep_method_on_the_rest(seed):
    """PLMS of orders 1, 2, 3, 4, 4, …, whose step is DDIM's with the combined ε (Liu et al. 2022, Equations 11, 12)."""
    mine = ours.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True)
    mine.set_timesteps(10)  # 900, 800, 800, 700, …
    weights = ([1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    bars = [*mine.alphas_cumprod.double()[list(range(600, -1, -100))].tolist(), 1.0]
    generator, outputs = torch.Generator().manual_seed(seed), []
    x = torch.randn(SHAPE, generator=generator)
    for i, t in enumerate(mine.timesteps[4:]):
        outputs.insert(0, torch.randn(SHAPE, generator=generator))
        epsilon = sum(w * e.double() for w, e in zip(weights[min(i, 3)], outputs, strict=False))
        clean = (x.double() - math.sqrt(1 - bars[i]) * epsilon) / math.sqrt(bars[i])
        expected = math.sqrt(bars[i + 1]) * clean + math.sqrt(1 - bars[i + 1]) * epsilon
        x = mine.step(outputs[0], t, x).prev_sample
        assert float((x - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


# ---- where diffusers is wrong, and ours is not


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 30])
def test_ddim_takes_the_previous_timestep_from_the_list(seed, spacing, steps):
    theirs, mine = pair("DDIMScheduler", {"timestep_spacing": spacing, "clip_sample": False}, steps)
    bars = mine.alphas_cumprod.double()
    times = mine.timesteps.tolist()
    apart = 0.0
    for t, following in zip(times, [*times[1:], None], strict=True):
        x, output, z = (torch.randn(SHAPE) for _ in range(3))
        bar, bar_p = bars[t], 1.0 if following is None else bars[following]
        sigma = 0.6 * math.sqrt((1 - bar_p) / (1 - bar) * (1 - bar / bar_p))
        clean = (x.double() - math.sqrt(1 - bar) * output) / math.sqrt(bar)
        expected = math.sqrt(bar_p) * clean + math.sqrt(1 - bar_p - sigma**2) * output + sigma * z
        got = mine.step(output, t, x, eta=0.6, variance_noise=z).prev_sample
        assert float((got - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
        apart = max(apart, float((theirs.step(output, t, x, eta=0.6, variance_noise=z).prev_sample - got).abs().max()))
    assert apart > 1e-3  # or this difference need not be documented any more


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_the_second_difference_of_third_order_sde_solvers(seed, name):
    """diffusers adds −½ where the integral has +½ (Lu et al. 2022b, Equation 14 for twice the step): α' D2 apart."""
    config = {
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "heun",
        "prediction_type": "sample",
    }
    theirs, mine = pair(name, config | {"final_sigmas_type": "sigma_min", "lower_order_final": False}, 6)
    sigmas = mine.sigmas.double()
    lam, alpha = -sigmas.log(), 1 / (1 + sigmas**2).sqrt()
    x, outputs = torch.randn(SHAPE), []
    for i, t in enumerate(mine.timesteps[:3]):
        outputs.append(torch.randn(SHAPE))
        a, b = (s.step(outputs[i], t, x, generator=torch.manual_seed(seed)).prev_sample for s in (theirs, mine))
        x = a
    m = [output.double() for output in outputs]
    if name == "DPMSolverMultistepScheduler":
        h, h0, h1 = lam[3] - lam[2], lam[2] - lam[1], lam[1] - lam[0]
        second = ((m[2] - m[1]) * h / h0 - (m[1] - m[0]) * h / h1) * h / (h0 + h1)
    else:
        h, h0, h1 = lam[3] - lam[0], lam[2] - lam[0], lam[1] - lam[0]
        r0, r1 = h0 / h, h1 / h
        second = 2 * ((m[2] - m[0]) / r0 - (m[1] - m[0]) / r1) / (r0 - r1)
    difference = alpha[3] * second
    assert float((b - a - difference).abs().max()) <= 1e-5 * max(1.0, float(difference.abs().max()))


def test_ddpm_ends_without_noise(seed):
    theirs, mine = pair("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, 10)
    t, x, output = mine.timesteps[-1], torch.randn(SHAPE), torch.randn(SHAPE)
    assert int(t) > 0
    done = mine.step(output, t, x)
    assert torch.equal(done.prev_sample, done.pred_original_sample)
    assert float((theirs.step(output, t, x).prev_sample - done.prev_sample).abs().max()) > 0.1


# ---- noise


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("DDPMScheduler", {}, {}), ("DDIMScheduler", {}, {"eta": 1.0}), ("EulerAncestralDiscreteScheduler", {}, {}),
        ("EulerDiscreteScheduler", {}, {"s_churn": 5.0}), ("EDMEulerScheduler", {}, {"s_churn": 5.0}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}), ("LCMScheduler", {}, {}),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}), ("TCDScheduler", {}, {}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("start", [0, 2])
def test_our_own_noise_is_that_of_the_step(seed, name, config, options, start):
    """use_fastdiff_noise gives what a step with the same normals gives; a generator is then not drawn from."""
    inside, outside = (pair(name, config, 6)[1] for _ in range(2))
    inside.use_fastdiff_noise(seed, sample_offset=3)
    drawn = []

    def draw(generator, like, dtype):
        drawn.append(index)
        return fastdiff.randn(SHAPE, seed=seed, sample_offset=3, draw=index, stream=1)

    outside._draw = draw
    for scheduler in (inside, outside):
        if start and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
    x, generator = torch.randn(SHAPE), torch.Generator().manual_seed(1)
    before = generator.get_state()
    for index, t in enumerate(inside.timesteps.tolist()):
        if index < start:
            continue
        if hasattr(inside, "scale_model_input"):
            inside.scale_model_input(x, t), outside.scale_model_input(x, t)
        output = torch.randn(SHAPE)
        expected = outside.step(output, t, x, **options)
        got = inside.step(output, t, x, generator=generator, **options)
        assert torch.equal(got.prev_sample, expected.prev_sample)
        x = got.prev_sample
    assert torch.equal(generator.get_state(), before)
    assert drawn


def test_a_generator_for_each_image(seed):
    theirs, mine = pair("DDPMScheduler")
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    a, b = (
        s.step(output, 500, x, generator=[torch.Generator().manual_seed(k) for k in range(2)]).prev_sample
        for s in (theirs, mine)
    )
    assert float((a - b).abs().max()) <= 1e-5


def test_add_noise_and_velocity(seed):
    for name in NAMES:
        theirs, mine = pair(name, widen=False)
        x, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
        t = mine.timesteps[[0, 3, 3, 5]]
        for method in ("add_noise", "get_velocity"):
            if hasattr(theirs, method):
                a, b = (getattr(s, method)(x, noise, t) for s in (theirs, mine))
                assert float((a - b).abs().max()) <= 1e-6 * max(1.0, float(a.abs().max())), (name, method)
        if hasattr(theirs, "scale_noise") and name != "FlowMatchHeunDiscreteScheduler":  # whose timestep is one
            a, b = (s.scale_noise(x, t, noise) for s in (theirs, mine))
            assert float((a - b).abs().max()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_add_noise_in_half_precision(seed, dtype):
    """Ours is the float32 result, rounded; diffusers' table in float16 has no noise at t = 1."""
    x, noise, t = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype), torch.tensor([1, 1])
    exact = ours.DDPMScheduler().add_noise(x.float(), noise.float(), t)
    assert torch.equal(ours.DDPMScheduler().add_noise(x, noise, t), exact.to(dtype))
    assert torch.equal(diffusers.DDPMScheduler().add_noise(x, noise, t), x)
    mine = pair("EulerDiscreteScheduler")[1]
    t = mine.timesteps[[2, 5]]
    assert torch.equal(mine.add_noise(x, noise, t), mine.add_noise(x.float(), noise.float(), t).to(dtype))
