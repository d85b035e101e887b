"""From a sampler's name or function and its options to its plan."""

import pytest
import torch
from helpers import assert_same_bits, half

import fastdiff
from fastdiff.samplers import SAMPLERS

SHAPE = (4, 3, 8, 8)


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


def test_the_spacing_that_a_name_says():
    """The sampler and the spacing of a name in another program's spelling, and what goes beside it."""
    options = {"steps": 6, "seed": 1}
    karras = fastdiff.sample(half, SHAPE, sampler="dpmpp_2m", spacing="karras", **options)
    for name in ("dpm++ 2m karras", "DPM++ 2M Karras", "dpmpp_2m_karras"):
        assert_same_bits(fastdiff.sample(half, SHAPE, sampler=name, **options), karras)
        assert_same_bits(fastdiff.sample(half, SHAPE, sampler=name, spacing="karras", **options), karras)
    got = fastdiff.sample(half, SHAPE, sampler="dpm++ 2m karras", spacing=fastdiff.Spacing(rho=5.0), **options)
    rho = fastdiff.Spacing("karras", rho=5.0)
    assert_same_bits(got, fastdiff.sample(half, SHAPE, sampler="dpmpp_2m", spacing=rho, **options))
    same = fastdiff.sample(half, SHAPE, sampler="dpm++ 2m karras", sampler_options={"rho": 5.0}, **options)
    assert_same_bits(got, same)
    for spacing in ("trailing", fastdiff.Spacing(timesteps=[500, 10])):
        with pytest.raises(ValueError, match=r"sampler='dpm\+\+ 2m karras' says the spacing 'karras'"):
            fastdiff.sample(half, SHAPE, sampler="dpm++ 2m karras", spacing=spacing, **options)
    with pytest.raises(ValueError, match=r"'Euler A' does not take order; it takes prediction, .*eta"):
        fastdiff.sample(half, SHAPE, sampler="Euler A", sampler_options={"order": 2}, **options)


@pytest.mark.parametrize(
    ("sampler", "error", "names"),
    [
        (type("Mine", (), {}), TypeError, "a function; got the class Mine"),
        (type("Scheduler", (), {"set_timesteps": 1})(), TypeError, "got Scheduler; NoiseSchedule.from_diffusers"),
        (3, TypeError, "a function; got int"),
    ],
)
def test_refuses_what_is_no_sampler(sampler, error, names):
    with pytest.raises(error, match=names):
        fastdiff.sample(half, SHAPE, sampler=sampler, steps=3)


# ---- networks with a learned variance


def with_variance(x, t):
    """ε, and a second half that must not be read."""
    return torch.cat([x * 0.5, torch.full_like(x, float("nan"))], dim=1)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"ddpm", "repaint"}))
def test_a_sampler_without_use_for_a_learned_variance_takes_the_mean(seed, sampler, variance):
    options = {"sampler": sampler, "steps": 4, "seed": seed}
    if sampler == "ddim":
        options["eta"] = 0.7
    if sampler == "ddim_inverse":
        options["x_init"] = torch.rand(SHAPE)
    got = fastdiff.sample(with_variance, SHAPE, variance=variance, **options)
    assert_same_bits(got, fastdiff.sample(half, SHAPE, **options))
    with pytest.raises(ValueError, match=r"twice the channels: variance='learned_range' says"):
        fastdiff.sample(with_variance, SHAPE, **options)


def test_a_learned_variance_in_repaint_and_in_a_function(seed):
    options = {"steps": 6, "seed": seed, "mask": torch.ones(8, 8).triu(), "known": torch.rand(SHAPE),
               "sampler_options": {"jump_length": 2, "jump_n_sample": 2}, "sampler": "repaint"}  # fmt: skip
    got = fastdiff.sample(with_variance, SHAPE, variance="learned_range", eta=0.5, **options)
    assert_same_bits(got, fastdiff.sample(half, SHAPE, eta=0.5, **options))
    told = fastdiff.sample(lambda x, t: torch.cat([x * 0.5, x], 1), SHAPE, variance="learned_range", **options)
    assert not torch.equal(told, fastdiff.sample(half, SHAPE, **options))  # DDPM's step reads it

    def mine(schedule, steps, *, eta=0.5):
        return fastdiff.samplers.ddim(schedule, steps, eta=eta)

    got = fastdiff.sample(with_variance, SHAPE, sampler=mine, steps=4, seed=seed, variance="learned_range")
    assert_same_bits(got, fastdiff.sample(half, SHAPE, sampler="ddim", eta=0.5, steps=4, seed=seed))


def test_the_mean_under_guidance_and_in_update(seed):
    def network(x, t, y):
        return torch.cat([x * y.view(-1, 1, 1, 1), torch.full_like(x, float("nan"))], dim=1)

    given = {"sampler": "dpmpp_2m_sde", "steps": 4, "seed": seed, "model_kwargs": {"y": torch.full((4,), 0.5)},
             "uncond_kwargs": {"y": torch.full((4,), 0.25)}, "guidance_scale": 2.0}  # fmt: skip
    got = fastdiff.sample(network, SHAPE, variance="learned_range", **given)
    assert_same_bits(got, fastdiff.sample(lambda x, t, y: x * y.view(-1, 1, 1, 1), SHAPE, **given))
    plan = fastdiff.samplers.resolve.resolve_plan("ddim", 3, eta=1.0, variance="learned_range")
    assert (plan.learned_variance, plan.reads_variance) == (True, False)
    assert fastdiff.Plan.from_json(plan.to_json()) == plan
    x = torch.rand(SHAPE)
    fixed = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 3, eta=1.0)
    assert_same_bits(fastdiff.ops.update(x, with_variance(x, 0), plan, 0, seed=seed).x,
                     fastdiff.ops.update(x, half(x, 0), fixed, 0, seed=seed).x)  # fmt: skip


@pytest.mark.parametrize("name", ["fixed_small_log", "fixed_large_log"])
def test_diffusers_logarithms_are_refused_with_the_reason(name):
    for sampler in ("ddpm", "ddim"):
        with pytest.raises(ValueError, match=f"variance is '{name}': .*'{name.removesuffix('_log')}'"):
            fastdiff.sample(half, SHAPE, sampler=sampler, steps=3, variance=name)
