"""The cases that multistep and singlestep samplers are walked through, each row against the published updates."""

import math

import pytest
import torch
from helpers import planned, spaced
from samplers_multistep import Network, dpm_reference, walk
from samplers_singlestep import at_ratio, singlestep_reference

from fastdiff import NoiseSchedule, samplers
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule

VP = NoiseSchedule.scaled_linear()
FLOW = {"sigmas": (0.98, 0.9, 0.71, 0.52, 0.3, 0.14, 0.05, 0.0)}
# schedule, walk, prediction: every prediction type, VP, VE and flow states, both ends.
CASES = [
    (VP, {"steps": 7}, "epsilon"),
    (VP, {"steps": 6, "final": "sigma_min"}, "v_prediction"),
    (VP, {"steps": 6}, "sample"),
    (VP, {"sigmas": (14.0, 6.0, 2.5, 1.1, 0.5, 0.2, 0.03)}, "score"),
    (VP, {"steps": 7, "ve": True, "spacing": "karras"}, "epsilon"),
    (VP, {"steps": 5, "ve": True}, "v_prediction"),
    (VP, {"steps": 6, "ve": True, "final": "sigma_min"}, "score"),
    (EDMSchedule(0.05, 12.0), {"steps": 6}, "edm"),
    (EDMSchedule(0.02, 12.0), {"sigmas": (12.0, 7.0, 3.0, 1.0, 0.4, 0.1, 0.02)}, "sample"),
    (FlowSchedule(), FLOW, "flow_prediction"),
    (FlowSchedule(), {"sigmas": FLOW["sigmas"][:-1]}, "flow_prediction"),
]
CASE = pytest.mark.parametrize("case", range(len(CASES)))
NAMES = (
    "lms", "pndm", "dpm_multistep", "dpm_singlestep", "dpm_solver_2", "dpm_solver_3", "dpmpp_1s", "dpmpp_2s",
    "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde", "deis", "unipc",
)  # fmt: skip
# Options under which a sampler's rows read and write the most.
FULL = {
    "pndm": {"skip_prk_steps": False}, "unipc": {"order": 3}, "deis": {"order": 3},
    "dpm_solver_3": {"solver_type": "heun"},
    "dpm_singlestep": {"order": 3, "solver_type": "heun", "eta": 1.0}, "dpm_multistep": {"order": 3, "eta": 0.5},
}  # fmt: skip
NAMED = {  # the name's options, and what they stand for: order, noise form, rule, η, falling orders at the end
    "dpmpp_1s": ({}, 1, False, "midpoint", 0.0, True),
    "dpmpp_2m": ({}, 2, False, "midpoint", 0.0, True),
    "dpmpp_3m": ({}, 3, False, "published", 0.0, True),
    "dpmpp_2m_sde": ({}, 2, False, "midpoint", 1.0, True),
    "dpmpp_3m_sde": ({}, 3, False, "heun", 1.0, False),
    "dpm_solver_2": ({"method": "multistep"}, 2, True, "midpoint", 0.0, True),
    "dpm_solver_3": ({"method": "multistep"}, 3, True, "midpoint", 0.0, True),
}


def check(case, clip, sampler, reference, *, ve=None, **options):
    """Every row's state against the reference's, and the timesteps that the network was told."""
    schedule, where, prediction = CASES[case]
    where = where if ve is None or not isinstance(schedule, NoiseSchedule) else {**where, "ve": ve}
    points = spaced(schedule, **where)
    plan = planned(getattr(samplers, sampler), schedule, prediction=prediction, clip=clip, **options, **where)
    x = torch.randn(2, 5, dtype=torch.float64) * math.hypot(points[0].alpha, points[0].sigma)
    noises = [torch.randn(2, 5, dtype=torch.float64) for _ in plan]
    network = Network(prediction, clip)
    wanted = list(reference(points, x, network, iter([*noises, *noises])))
    assert len(wanted) == len(plan) == network.calls
    assert list(plan.timesteps) == pytest.approx(network.told)
    for i, (got, exact) in enumerate(
        zip(walk(plan, x, lambda x, row, i: network.raw(x, i), noises), wanted, strict=True)
    ):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-9 * float(exact.abs().max() + 1), msg=f"row {i}")


def warm(count, order, final_zero, lower):
    """The orders of a multistep run: rising from 1, and falling where asked or where the end has no noise."""
    orders = [min(i + 1, order) for i in range(count)]
    if lower:
        orders = [min(n, count - i) for i, n in enumerate(orders)]
    if final_zero:
        orders[-1] = 1
    return orders


def check_named_multistep(case: int, name: str) -> None:
    options, order, noise_form, rule, eta, lower = NAMED[name]

    def reference(points, x, f, z):
        orders = warm(len(points) - 1, order, points[-1].sigma == 0, lower)
        return dpm_reference(points, x, f, z, orders=orders, noise_form=noise_form, rule=rule, eta=eta)

    check(case, 1.0, name, reference, **options)


def check_singlestep(case: int, name: str) -> None:
    schedule, where, _ = CASES[case]
    stochastic = name in ("dpmpp_2s_ancestral", "dpmpp_sde")
    r = {"r": 0.4} if name == "dpmpp_sde" else {}
    for eta, clip in [(1.0, None), (0.5, 1.0), (0.0, None)] if stochastic else [(0.0, None), (0.0, 1.0)]:

        def reference(points, x, f, z, eta=eta):
            same = "dpmpp_2s_ancestral" if name == "dpmpp_2s" else name
            at = lambda ratio: at_ratio(schedule, ratio, where.get("ve", False))  # noqa: E731
            return singlestep_reference(points, x, f, z, at, name=same, eta=eta, **r)

        check(case, clip, name, reference, **({"eta": eta, **r} if stochastic else {}))
    if name == "dpm_solver_3":
        at = lambda ratio: at_ratio(schedule, ratio, where.get("ve", False))  # noqa: E731
        check(
            case, None, name,
            lambda points, x, f, z: singlestep_reference(points, x, f, z, at, name="dpm_solver_3_taylor"),
            solver_type="heun",
        )  # fmt: skip
