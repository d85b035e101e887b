"""The one- and two-stage samplers in whole runs, on every backend, and what they refuse."""

import math

import pytest
import torch
from helpers import assert_same_bits, half, planned
from samplers_onestep import EDM, LINEAR, NAMES, SHAPE, run

import fastdiff
from fastdiff import samplers

RUNS = {
    "euler": {"s_churn": 2.0},
    "euler_ancestral": {"eta": 0.8},
    "heun": {"s_churn": 1.5},
    "dpm2": {},
    "dpm2_ancestral": {},
    "lcm": {},
    "tcd": {"eta": 0.5},
    "ddim_inverse": {},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs(seed, backend, name, dtype):
    """Stopped anywhere and resumed, or with fewer images: the same bits; and those of the reference."""
    options = {"sampler": name, "steps": 4, "sampler_options": RUNS[name], "seed": seed, "backend": backend}
    options |= {"model_dtype": dtype, "clip": 2.0}
    if name == "ddim_inverse":
        options["x_init"] = torch.randn(3, 2, 5, 3)
    shape = (3, 2, 5, 3)
    seen = []

    def model(x, t):
        seen.append(x.dtype)
        return x * 0.5 + t.view(-1, 1, 1, 1).to(x.dtype) * 1e-3

    straight = fastdiff.sample(model, shape, **options)
    assert straight.dtype == torch.float32
    assert set(seen) == {dtype}
    assert bool(straight.isfinite().all())
    states = list(fastdiff.sample_iter(model, shape, **options))
    assert_same_bits(states[-1].x, straight)
    first = options.pop("x_init", None)
    for state in states:
        assert_same_bits(fastdiff.sample(model, shape, resume=state, **options), straight, f"from row {state.row}")
    if first is not None:
        options["x_init"] = first[:2]
    assert_same_bits(fastdiff.sample(model, (2, *shape[1:]), **options), straight[:2])
    if backend != "reference":
        if first is not None:
            options["x_init"] = first
        assert_same_bits(fastdiff.sample(model, shape, **options | {"backend": "reference"}), straight)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "euler_ancestral"])
def test_flow_and_edm_runs(seed, simd, name):
    for schedule, prediction, spacing in (("flow", "flow_prediction", None), ("edm", "edm", None),
                                          ("edm", "sample", "exponential")):  # fmt: skip
        options = {"sampler": name, "steps": 5, "schedule": schedule, "prediction": prediction, "spacing": spacing}
        a, b = (fastdiff.sample(half, SHAPE, seed=seed, backend=which, **options) for which in ("reference", "native"))
        assert_same_bits(a, b)
        assert bool(a.isfinite().all())


def test_a_bfloat16_network_keeps_a_float32_state(seed):
    """Each row in float32, from what the network returned in bfloat16."""
    outputs = []

    def model(x, t):
        outputs.append(x * 0.5)
        return outputs[-1]

    plan = samplers.heun(LINEAR, 4, s_churn=1.0)
    got = fastdiff.sample(model, SHAPE, sampler=plan, seed=seed, model_dtype=torch.bfloat16)
    x = fastdiff.randn(SHAPE, seed=seed).double() * plan.init_sigma
    noises = [
        fastdiff.randn(SHAPE, seed=seed, draw=i, stream=1).double() for i, row in enumerate(plan) if row.uses("z")
    ]
    # What float32 rounds away of a state as large as x_T, some sixteen times over.
    rounding = 16 * torch.finfo(torch.float32).eps / 2 * float(x.abs().max())
    torch.testing.assert_close(got.double(), run(plan, x, outputs, noises), rtol=1e-5, atol=rounding)


# ---- what they refuse


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"prediction": "noise"}, ValueError, "prediction is 'noise'"),
        ({"prediction": "epsilom"}, ValueError, "did you mean 'epsilon'"),
        ({"clip": 0.0}, ValueError, "clip"),
        ({"clip": "1"}, TypeError, "clip"),
        ({"steps": 1001}, ValueError, "steps"),
        ({"steps": 2.5}, TypeError, "steps"),
        ({"spacing": "carras"}, ValueError, "did you mean 'karras'"),
        ({"sigmas": [300.0, 200.0, 0.0]}, ValueError, "same timestep"),
        ({"timesteps": [5, 5]}, ValueError, "timesteps"),
        ({"sigmas": [1.0, 3.0, 0.0]}, ValueError, "σ must fall"),
        ({"sigma": [1.0]}, TypeError, "sigma"),
    ],
)
def test_refuses(name, arguments, error, names):
    with pytest.raises(error, match=names):
        planned(getattr(samplers, name), LINEAR, **arguments)


@pytest.mark.parametrize(
    ("name", "schedule", "arguments", "error", "names"),
    [
        *((name, LINEAR, {"eta": value}, error, "eta")
          for name in ("euler_ancestral", "dpm2_ancestral", "tcd")
          for value, error in ((-0.1, ValueError), (1.1, ValueError), (math.nan, ValueError), ("1", TypeError))),
        *((name, LINEAR, arguments, error, next(iter(arguments)))
          for name in ("euler", "heun", "dpm2")
          for arguments, error in (({"s_churn": -1.0}, ValueError), ({"s_churn": math.inf}, ValueError),
                                   ({"s_tmin": -1.0}, ValueError), ({"s_tmax": -1.0}, ValueError),
                                   ({"s_tmax": 1.0, "s_tmin": 2.0}, ValueError), ({"s_noise": -1.0}, ValueError),
                                   ({"s_noise": math.nan}, ValueError), ({"s_churn": "1"}, TypeError))),
        ("euler_ancestral", LINEAR, {"s_noise": -1.0}, ValueError, "s_noise"),
        ("dpm2_ancestral", LINEAR, {"s_noise": math.inf}, ValueError, "s_noise"),
        ("tcd", EDM, {}, ValueError, "share"),
        ("lcm", "flow", {}, TypeError, "schedule"),
        ("lcm", LINEAR, {"steps": 51}, ValueError, "steps.*50"),
        ("tcd", LINEAR, {"original_inference_steps": 1001}, ValueError, "original_inference_steps"),
        ("lcm", LINEAR, {"timestep_scaling": -1.0}, ValueError, "timestep_scaling"),
        ("lcm", LINEAR, {"sigma_data": 0.0}, ValueError, "sigma_data"),
        ("ddim_inverse", LINEAR, {"prediction": "sample"}, ValueError, "final='sigma_min'"),
        ("ddim_inverse", LINEAR, {"prediction": "edm"}, ValueError, "edm"),
        ("ddim_inverse", LINEAR, {"prediction": "score"}, ValueError, "score"),
        ("euler", LINEAR.rescale_zero_terminal_snr(), {}, ValueError, "ᾱ is 0"),
        ("lcm", LINEAR.rescale_zero_terminal_snr(), {}, ValueError, "epsilon"),
        ("euler", "linear", {}, TypeError, "schedule"),
    ],
)  # fmt: skip
def test_refuses_its_own(name, schedule, arguments, error, names):
    with pytest.raises(error, match=names):
        planned(getattr(samplers, name), schedule, **{"steps": 5} | arguments)


def test_starting_noise():
    """σ of the first level, as in k-diffusion; 1 where states are VP."""
    for name in NAMES:
        plan = planned(getattr(samplers, name), LINEAR, 5)
        assert plan.init_sigma == plan[0].sigma == pytest.approx(math.sqrt(1 / float(LINEAR.alphas_cumprod[999]) - 1))
        z = fastdiff.randn((1, 4), seed=3)
        _, first, *_ = fastdiff.sample_iter(lambda x, t: x, (1, 4), sampler=plan, seed=3)
        # x_T = σ z; a network that echoes its input c_in·x says ε = z c_in σ.
        row = plan[0]
        torch.testing.assert_close(first.x0, z * row.sigma * (1 - row.sigma * row.c_in), rtol=1e-5, atol=1e-2)
    for name in ("lcm", "tcd", "ddim_inverse"):
        assert planned(getattr(samplers, name), LINEAR, 5).init_sigma == 1
