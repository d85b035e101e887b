"""Multistep and exponential-integrator samplers against the installed diffusers, with its lists and the same noise.

diffusers is given float64 tensors and its σ as float64, since its float32 coefficients err by 1e-5 and more.
"""

import itertools
import math

import pytest
import torch
from helpers import planned
from samplers_multistep import walk
from torch import Tensor

from fastdiff import NoiseSchedule, samplers
from fastdiff.schedules.continuous import FlowSchedule

diffusers = pytest.importorskip("diffusers")

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation")]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (2, 3, 4, 4)
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def network(prediction, seed, vp=None):
    """A network's output whose x̂_0 is bounded, given α and σ of the state."""
    y = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def model(x: Tensor, alpha: float, sigma: float) -> Tensor:
        x0 = torch.tanh(y + 0.3 * x * alpha / (alpha**2 + sigma**2))
        epsilon = (x - alpha * x0) / sigma
        if prediction == "v_prediction":
            out = (alpha * epsilon - sigma * x0) if vp is None else (epsilon - sigma * x0) / math.hypot(1, sigma)
        else:
            out = {"epsilon": epsilon, "sample": x0, "flow_prediction": epsilon - x0}[prediction]
        return out

    return model


def compare(scheduler, plan, model, levels, seed, *, stochastic=False, mend=None, **extra):
    """Both walk from the same noise; after every row they agree to 1e-5 of the state's size."""
    generator = torch.Generator().manual_seed(seed)
    theirs = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * plan.init_sigma
    noises = None
    if stochastic:
        extra["generator"] = torch.Generator().manual_seed(seed)
        dtype = torch.float32 if "Multistep" in type(scheduler).__name__ else torch.float64
        noises = [torch.randn(SHAPE, generator=generator.manual_seed(seed), dtype=dtype)]
        noises += [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in plan.rows[1:]]
    assert len(scheduler.timesteps) == len(plan)
    ours_from = walk(plan, theirs, lambda x, row, i: model(x / row.c_in, *levels[i]), noises)
    for i, (t, ours) in enumerate(zip(scheduler.timesteps, ours_from, strict=True)):
        assert plan[i].t == float(t)
        scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(model(theirs, *levels[i]), t, theirs, **extra).prev_sample
        if mend is not None:
            theirs = theirs + mend(i)
        error, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
        assert error <= 1e-5 * max(1.0, size), f"row {i} of {len(plan)}: {error} at {size}"


def listed(scheduler, steps, *, flow=False):
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    sigmas = scheduler.sigmas.tolist()
    if sigmas[-1] == sigmas[-2]:  # a last step of no length, which a walk does not have
        sigmas[-1] *= 1 - 1e-9
    if flow:
        return {"timesteps": scheduler.timesteps.tolist(), "sigmas": sigmas}, [(1 - s, s) for s in sigmas]
    levels = [(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in sigmas]
    return {"timesteps": scheduler.timesteps.tolist(), "sigmas": sigmas}, levels


# ---- DPM-Solver


ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_multistep(seed, algorithm, solver_type, order):
    if algorithm == "sde-dpmsolver" and order == 3:
        pytest.skip("diffusers has no third order of it")
    final = "zero" if algorithm.endswith("++") else "sigma_min"
    cases = [(10, {}), (17, {}), (10, {"use_karras_sigmas": True}), (6, {"lower_order_final": False}), (2, {}), (1, {})]
    if algorithm.endswith("++"):
        cases += [
            (17, {"final_sigmas_type": "sigma_min"}),
            (17, {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ]
    for (steps, more), prediction in zip(cases, itertools.cycle(PREDICTIONS)):
        config = {"final_sigmas_type": final, **more}
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **BETAS, algorithm_type=algorithm, solver_type=solver_type, solver_order=order, prediction_type=prediction,
            **config,
        )  # fmt: skip
        lists, levels = listed(scheduler, steps)
        stochastic = algorithm.startswith("sde")
        plan = planned(
            samplers.dpm_multistep,
            SCHEDULE, prediction=prediction, order=order, algorithm=algorithm.removeprefix("sde-"),
            solver_type=solver_type, eta=float(stochastic), lower_order_final=config.get("lower_order_final", True),
            euler_at_final=config.get("euler_at_final", False), **lists,
        )  # fmt: skip
        mend = None
        if algorithm == "sde-dpmsolver++" and order == 3:
            mend = third_order_mend(scheduler, levels, config)
        compare(scheduler, plan, network(prediction, seed), levels, seed, stochastic=stochastic, mend=mend)


def third_order_mend(scheduler, levels, config):
    """What diffusers 0.42.1 leaves out of SDE-DPM-Solver++'s third order: its 1/2 beside φ_3 has the wrong sign."""
    lambdas = [math.log(a / s) if s else math.inf for a, s in levels]
    calls = len(levels) - 1
    lower = config.get("lower_order_final", True) and calls < 15

    def mend(i):
        if (
            i < 2
            or (i == calls - 1 and (levels[-1][1] == 0 or "euler_at_final" in config))
            or (lower and i >= calls - 2)
        ):
            return 0.0
        m2, m1, m0 = scheduler.model_outputs
        h = lambdas[i + 1] - lambdas[i]
        r0, r1 = (lambdas[i] - lambdas[i - 1]) / h, (lambdas[i - 1] - lambdas[i - 2]) / h
        return levels[i + 1][0] * ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1)

    return mend


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_singlestep(seed, algorithm, solver_type, order):
    if algorithm == "sde-dpmsolver++" and order == 3 and solver_type == "heun":
        pytest.skip("diffusers has the wrong sign in it that test_dpm_multistep mends")
    final = "zero" if algorithm.endswith("++") else "sigma_min"
    cases = [(9, {}), (10, {}), (11, {}), (10, {"use_karras_sigmas": True}), (2, {}), (1, {})]
    cases = [(steps, {"lower_order_final": True, **more}) for steps, more in cases]
    cases += [(12, {"final_sigmas_type": "sigma_min"}), (12, {})]
    for (steps, more), prediction in zip(cases, itertools.cycle(PREDICTIONS)):
        config = {"final_sigmas_type": final, **more}
        scheduler = diffusers.DPMSolverSinglestepScheduler(
            **BETAS, algorithm_type=algorithm, solver_type=solver_type, solver_order=order, prediction_type=prediction,
            **config,
        )  # fmt: skip
        lists, levels = listed(scheduler, steps)
        stochastic = algorithm.startswith("sde")
        plan = planned(
            samplers.dpm_singlestep,
            SCHEDULE, prediction=prediction, order=order, algorithm=algorithm.removeprefix("sde-"),
            solver_type=solver_type, eta=float(stochastic), lower_order_final=scheduler.config.lower_order_final,
            **lists,
        )  # fmt: skip
        compare(scheduler, plan, network(prediction, seed), levels, seed, stochastic=stochastic)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow(seed, name):
    """x = (1 − σ) x_0 + σ ε, at σ = 1 too for the one that avoids it by 1e-6."""
    scheduler = getattr(diffusers, name)(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", solver_order=3
    )
    lists, levels = listed(scheduler, 12, flow=True)
    sampler = samplers.unipc if name.startswith("Uni") else samplers.dpmpp_3m
    own = {"order": 3} if name.startswith("Uni") else {}
    plan = planned(sampler, FlowSchedule(3.0), prediction="flow_prediction", **own, **lists)
    compare(scheduler, plan, network("flow_prediction", seed), levels, seed)


# ---- the others


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(seed, solver_type, predict_x0, order):
    cases = [(10, {}), (17, {"disable_corrector": [0, 1, 5]}), (10, {"use_karras_sigmas": True}), (2, {}), (1, {}),
             (6, {"lower_order_final": False, "final_sigmas_type": "sigma_min"})]  # fmt: skip
    for (steps, config), prediction in zip(cases, itertools.cycle(PREDICTIONS)):
        if not predict_x0 or solver_type == "bh1":  # their bh1 multiplies infinity by 0 where the last σ is 0
            config = {**config, "final_sigmas_type": "sigma_min"}
        if "use_karras_sigmas" in config and "final_sigmas_type" in config:
            continue  # they divide by the last step's length, which is 0 there
        scheduler = diffusers.UniPCMultistepScheduler(
            **BETAS, solver_type=solver_type, solver_order=order, prediction_type=prediction, predict_x0=predict_x0,
            **config,
        )  # fmt: skip
        lists, levels = listed(scheduler, steps)
        plan = planned(
            samplers.unipc,
            SCHEDULE, prediction=prediction, order=order, solver_type=solver_type, predict_x0=predict_x0,
            lower_order_final=config.get("lower_order_final", True),
            disable_corrector=config.get("disable_corrector", ()), **lists,
        )  # fmt: skip
        compare(scheduler, plan, network(prediction, seed), levels, seed)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(seed, prediction, order):
    for steps, config in [
        (10, {}),
        (17, {}),
        (10, {"use_karras_sigmas": True}),
        (2, {}),
        (6, {"lower_order_final": False}),
    ]:
        scheduler = diffusers.DEISMultistepScheduler(**BETAS, solver_order=order, prediction_type=prediction, **config)
        lists, levels = listed(scheduler, steps)
        lower = config.get("lower_order_final", True)
        plan = planned(samplers.deis, SCHEDULE, prediction=prediction, order=order, lower_order_final=lower, **lists)
        compare(scheduler, plan, network(prediction, seed), levels, seed)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms(seed, prediction, order):
    for steps, config in [(10, {}), (10, {"use_karras_sigmas": True}), (10, {"timestep_spacing": "leading"}), (1, {})]:
        scheduler = diffusers.LMSDiscreteScheduler(**BETAS, prediction_type=prediction, **config)
        lists, levels = listed(scheduler, steps)
        levels = [(1.0, s) for s in scheduler.sigmas.double().tolist()]
        plan = planned(samplers.lms, SCHEDULE, prediction=prediction, order=order, **lists)
        compare(scheduler, plan, network(prediction, seed, vp=False), levels, seed, order=order)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("skip_prk_steps", [True, False])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_pndm(seed, prediction, skip_prk_steps, set_alpha_to_one):
    """At an even T/steps: at an odd one diffusers' first Runge–Kutta row stops beside the level of the second."""
    for steps in (4, 10, 50) if not skip_prk_steps else (1, 2, 4, 8, 25):
        scheduler = diffusers.PNDMScheduler(
            **BETAS, steps_offset=1, skip_prk_steps=skip_prk_steps, set_alpha_to_one=set_alpha_to_one,
            prediction_type=prediction,
        )  # fmt: skip
        scheduler.set_timesteps(steps)
        scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
        if not set_alpha_to_one:
            scheduler.final_alpha_cumprod = SCHEDULE.alphas_cumprod[0]
        bars = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
        plan = planned(
            samplers.pndm,
            SCHEDULE, steps, prediction=prediction, skip_prk_steps=skip_prk_steps, spacing="leading", steps_offset=1,
            final="zero" if set_alpha_to_one else "sigma_min", averages="output",
        )  # fmt: skip
        levels = [(math.sqrt(bar), math.sqrt(1 - bar)) for bar in bars]
        compare(scheduler, plan, network(prediction, seed), levels, seed)
