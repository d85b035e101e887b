"""Multistep and exponential-integrator samplers against the installed diffusers, with its lists and the same noise."""

import itertools
import math

import pytest
from beside_diffusers import BETAS, PREDICTIONS, SCHEDULE, compare, listed, network
from helpers import planned

from fastdiff import samplers
from fastdiff.schedules.continuous import FlowSchedule

diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation")]


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
