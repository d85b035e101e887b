"""LMS against the Adams–Bashforth integral, and DEIS against the same in ln ρ."""

import pytest
from multistep_cases import CASE, check, warm
from samplers_multistep import adams_reference


@CASE
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_and_deis(seed, case, order):
    for ve, clip in [(True, None), (False, 1.0)]:
        check(
            case, clip, "lms",
            lambda points, x, f, z: adams_reference(
                points, x, f, orders=warm(len(points) - 1, order, False, False), logarithmic=False
            ), ve=ve, order=order,
        )  # fmt: skip
    for clip, lower in [(None, False), (1.0, True)] if order < 4 else []:
        check(
            case, clip, "deis",
            lambda points, x, f, z, lower=lower: adams_reference(
                points, x, f, orders=warm(len(points) - 1, order, points[-1].sigma == 0, lower), logarithmic=True
            ), order=order, lower_order_final=lower,
        )  # fmt: skip
