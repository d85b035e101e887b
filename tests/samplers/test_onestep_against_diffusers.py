"""The one- and two-stage samplers beside diffusers' schedulers, step by step from the same x, m and noise."""

import itertools

import pytest
import torch
from helpers import planned
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule, Spacing, samplers
from fastdiff.plan.plan import Plan
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' use of numpy
SHAPE = (2, 3, 4, 4)
SCALED = NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def compare(scheduler, plan: Plan, told: bool = True, **step) -> None:
    """Walk both, ours taking up diffusers' x at every row. ``told``: whether the timesteps must be equal too."""
    assert len(scheduler.timesteps) == len(plan)
    x, anchor = torch.randn(SHAPE) * plan.init_sigma, None
    for i, t in enumerate(scheduler.timesteps):
        assert plan[i].t == pytest.approx(float(t), rel=1e-6, abs=1e-4 if told else 0.02)
        if hasattr(scheduler, "scale_model_input"):
            shown = scheduler.scale_model_input(x, t)
            torch.testing.assert_close(x * plan[i].c_in, shown, rtol=1e-5, atol=1e-5)
        m, state = torch.randn(SHAPE), torch.get_rng_state()
        options = step | ({"generator": torch.Generator().manual_seed(i)} if plan[i].uses("z") else {})
        expected = scheduler.step(m, t, x, return_dict=False, **options)[0]
        torch.set_rng_state(state)
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) if plan[i].uses("z") else None
        out = fastdiff.ops.update(x, m, plan, i, noise=z, anchor=anchor)
        error = (out.x - expected).abs() / expected.abs().clamp(min=1)
        assert float(error.max()) <= 1e-5, f"row {i}: {float(error.max())}"
        x, anchor = expected, out.anchor if out.anchor is not None else anchor


def lists(scheduler, order: int = 1) -> dict[str, Tensor]:
    """The σ and timesteps of diffusers' base walk; Heun and DPM2 repeat each but the first."""
    sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
    if order == 2:
        steps = scheduler.num_inference_steps
        sigmas = torch.cat([sigmas[:1], sigmas[1::2]])[: steps + 1]
        timesteps = torch.cat([timesteps[:1], timesteps[len(timesteps) - 2 * (steps - 1) + 1 :: 2]])
    return {"sigmas": sigmas, "timesteps": timesteps}


WALKS = [{"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"},
         {"timestep_spacing": "leading", "steps_offset": 1}, {"use_karras_sigmas": True}]  # fmt: skip
PAIRS = {"euler": "Euler", "euler_ancestral": "EulerAncestral", "heun": "Heun", "dpm2": "KDPM2",
         "dpm2_ancestral": "KDPM2Ancestral"}  # fmt: skip
CASES = [(n, walk) for n, walk in itertools.product(PAIRS, WALKS) if "timestep_spacing" in walk or
         n != "euler_ancestral"]  # EulerAncestralDiscreteScheduler has no karras σ  # fmt: skip


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "walk"), CASES)
def test_k_diffusion(seed, name, walk, prediction):
    scheduler = getattr(diffusers, f"{PAIRS[name]}DiscreteScheduler")(**BETAS, **walk, prediction_type=prediction)
    scheduler.set_timesteps(10)  # linspace has whole timesteps then, as ours always has
    base = lists(scheduler, 1 if "euler" in name else 2)
    plan = planned(getattr(samplers, name), SCALED, prediction=prediction, **base)
    compare(scheduler, plan, told="dpm2" not in name)
    if "timestep_spacing" in walk:
        # And by our own names of the same walks.
        spacing, offset = walk["timestep_spacing"], walk.get("steps_offset", 0)
        named = planned(
            getattr(samplers, name), SCALED, 10, prediction=prediction, spacing=spacing, steps_offset=offset
        )
        assert len(named) == len(plan)
        for a, b in zip(named, plan, strict=True):
            assert (a.t, a.sigma) == pytest.approx((b.t, b.sigma), rel=1e-4, abs=0.02)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_heun_clips(seed, prediction):
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, prediction_type=prediction, clip_sample=True)
    scheduler.set_timesteps(6)
    compare(scheduler, planned(samplers.heun, SCALED, prediction=prediction, clip=1.0, **lists(scheduler, 2)))


def test_edm_euler(seed):
    """Their epsilon is EDM's F. Their x_T is √(σ_max² + 1) z, ours σ_max z as in EDM's own code."""
    for schedule in ("karras", "exponential"):
        scheduler = diffusers.EDMEulerScheduler(sigma_schedule=schedule)
        scheduler.set_timesteps(9)
        compare(scheduler, samplers.euler(EDMSchedule(), prediction="edm", spacing=Spacing(sigmas=scheduler.sigmas)))
        named = samplers.euler(EDMSchedule(), 9, prediction="edm", spacing=schedule)
        assert [row.sigma for row in named] == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)
        assert named.init_sigma == 80


def test_flow_euler(seed):
    for shift in (1.0, 3.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # as the pipelines of SD 3 and FLUX.1 call it
        compare(
            scheduler, planned(samplers.euler, FlowSchedule(shift), prediction="flow_prediction", **lists(scheduler))
        )
        compare(scheduler_again(scheduler), samplers.euler(FlowSchedule(shift), 4, prediction="flow_prediction"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.825)
    compare(scheduler, samplers.euler(FlowSchedule.for_tokens(2176), 4, prediction="flow_prediction"))


def scheduler_again(scheduler):
    """The same scheduler at its first step."""
    scheduler._step_index = None
    return scheduler


@pytest.mark.skipif(not hasattr(diffusers, "FlowMatchHeunDiscreteScheduler"), reason="this diffusers has none")
def test_flow_heun(seed):
    for shift in (1.0, 3.0):
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
        # Short steps: (x − x̂_0)/σ' of the second row loses h/2σ' times float32's precision, in theirs and in ours.
        scheduler.set_timesteps(40)
        compare(
            scheduler, planned(samplers.heun, FlowSchedule(shift), prediction="flow_prediction", **lists(scheduler, 2))
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_lcm(seed, prediction):
    for clip, steps in itertools.product((False, True), (1, 4, 7)):
        scheduler = diffusers.LCMScheduler(prediction_type=prediction, clip_sample=clip)
        scheduler.set_timesteps(steps)
        options = {"prediction": prediction, "clip": 1.0 if clip else None}
        compare(scheduler, samplers.lcm(SCALED, steps, **options))
        scheduler.set_timesteps(timesteps=[999, 500, 20])
        compare(scheduler, samplers.lcm(SCALED, spacing=Spacing(timesteps=[999, 500, 20]), **options))


def test_distilled_timesteps():
    """Every number of steps and of original steps."""
    for original in (50, 7, 25):
        scheduler = diffusers.LCMScheduler(original_inference_steps=original)
        for steps in range(1, original + 1):
            scheduler.set_timesteps(steps)
            plan = samplers.lcm(SCALED, steps, original_inference_steps=original)
            assert plan.timesteps == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_tcd(seed, prediction):
    for eta in (0.0, 0.3, 0.7, 1.0):
        scheduler = diffusers.TCDScheduler(prediction_type=prediction)
        scheduler.set_timesteps(5)
        compare(scheduler, samplers.tcd(SCALED, 5, prediction=prediction, eta=eta), eta=eta)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_inverse(seed, prediction):
    for clip, offset in itertools.product((False, True), (0, 1)):
        scheduler = diffusers.DDIMInverseScheduler(
            **BETAS, prediction_type=prediction, clip_sample=clip, steps_offset=offset
        )
        scheduler.set_timesteps(10)
        plan = samplers.ddim_inverse(SCALED, 10, prediction=prediction, clip=1.0 if clip else None,
                                     spacing=Spacing(steps_offset=offset))  # fmt: skip
        compare(scheduler, plan)


@pytest.mark.parametrize("which", ["vp", "edm"])
def test_churn(seed, which):
    """One step of theirs is two rows of ours. (Their network sees x before the churn; here m is given.)"""
    churn = {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.1}
    if which == "vp":
        scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
        scheduler.set_timesteps(8)
        plan = planned(samplers.euler, SCALED, **lists(scheduler), **churn)
    else:
        scheduler = diffusers.EDMEulerScheduler()
        scheduler.set_timesteps(8)
        plan = samplers.euler(EDMSchedule(), prediction="edm", spacing=Spacing(sigmas=scheduler.sigmas), **churn)
    assert len(plan) > 10
    x, row = torch.randn(SHAPE) * plan.init_sigma, 0
    for i, t in enumerate(scheduler.timesteps):
        m = torch.randn(SHAPE)
        scheduler.is_scale_input_called = True
        theirs = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(i), return_dict=False, **churn)[0]
        if not plan[row].calls_model:
            z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))
            x, row = fastdiff.ops.update(x, (), plan, row, noise=z).x, row + 1
        ours = fastdiff.ops.update(x, m, plan, row).x
        assert float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max()) <= 1e-5
        x, row = theirs, row + 1
    assert row == len(plan)
