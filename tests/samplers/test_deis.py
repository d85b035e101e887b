"""DEIS beside diffusers' scheduler; test_lms.py has its integral, which is LMS's in ln ρ."""

import pytest
from beside_diffusers import BETAS, PREDICTIONS, SCHEDULE, compare, listed, network
from helpers import planned

from fastdiff import samplers

diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation")]


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
