"""DPM-Solver and DPM-Solver++ of several steps against the published updates, in every option."""

import pytest
from helpers import spaced
from multistep_cases import CASE, CASES, check, warm
from samplers_multistep import dpm_reference


@CASE
@pytest.mark.parametrize("noise_form", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_multistep(seed, case, noise_form, order):
    runs = [("midpoint", 0.0, True, None), ("heun", 0.0, False, 1.0), ("exact", 0.0, False, None)]
    runs += [("exact", 0.6, True, 1.0), ("midpoint", 1.0, False, None), ("heun", 1.0, False, None)]
    for rule, eta, lower, clip in runs:
        zero = spaced(CASES[case][0], **CASES[case][1])[-1].sigma == 0
        if noise_form and zero and eta:
            continue

        def reference(points, x, f, z, rule=rule, eta=eta, lower=lower):
            orders = warm(len(points) - 1, order, points[-1].sigma == 0, lower)
            return dpm_reference(points, x, f, z, orders=orders, noise_form=noise_form, rule=rule, eta=eta)

        check(
            case, clip, "dpm_multistep", reference, order=order, solver_type=rule, eta=eta, lower_order_final=lower,
            algorithm="dpmsolver" if noise_form else "dpmsolver++",
        )  # fmt: skip
