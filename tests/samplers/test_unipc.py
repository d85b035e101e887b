"""UniPC against the linear systems of its Algorithms 5 to 8."""

import pytest
from multistep_cases import CASE, check, warm
from samplers_multistep import unipc_reference


@CASE
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(seed, case, order, variant):
    for noise_form, left_out, lower, clip in [
        (False, (), True, None),
        (True, (1, 3), False, 1.0),
        (False, (0,), False, 1.0),
    ]:

        def reference(points, x, f, z, noise_form=noise_form, left_out=left_out, lower=lower):
            orders = warm(len(points) - 1, order, points[-1].sigma == 0, lower)
            return unipc_reference(
                points, x, f, orders=orders, noise_form=noise_form, variant=variant, left_out=left_out
            )

        check(
            case, clip, "unipc", reference, order=order, solver_type=variant, predict_x0=not noise_form,
            lower_order_final=lower, disable_corrector=left_out,
        )  # fmt: skip
