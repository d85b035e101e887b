"""Singlestep DPM-Solver beside diffusers' scheduler; test_dpm_solver.py and test_dpmpp.py walk it by its names."""

import itertools

import pytest
from beside_diffusers import BETAS, PREDICTIONS, SCHEDULE, compare, listed, network
from helpers import planned

from fastdiff import samplers

diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation")]


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
