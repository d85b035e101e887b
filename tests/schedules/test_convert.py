"""The schedule that a diffusers config is, beside diffusers' own schedulers where they are installed."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import spaced

import fastdiff
from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule
from fastdiff.schedules import from_diffusers, prediction_from_diffusers

TABLES = (
    "DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete",
    "LMSDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep",
    "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver", "LCM", "TCD",
    "RePaint", "UnCLIP", "CogVideoXDDIM", "CogVideoXDPM",
)  # fmt: skip
ZERO_SNR = ("DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM", "TCD",
            "DDPM", "CogVideoXDDIM", "CogVideoXDPM")  # fmt: skip
NONE = ("ScoreSdeVe", "KarrasVe", "CMStochasticIterative", "ConsistencyDecoder", "IPNDM", "VQDiffusion", "Amused",
        "DDPMWuerstchen", "SCM", "CosineDPMSolverMultistep", "LTXEulerAncestralRF")  # fmt: skip
FLOWING = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver")


def scheduler(name, **options):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import deprecated

    found = getattr(diffusers, f"{name}Scheduler", None) or getattr(deprecated, f"{name}Scheduler", None)
    if found is None:
        pytest.skip(f"this diffusers has no {name}")
    return found(**options)


def ways(theirs, tmp_path):
    """The scheduler, its folder, a pipeline's folder, the config's text, and the config, which names no class."""
    config = dict(theirs.config)
    assert "_class_name" not in config
    theirs = type(theirs).from_config(config)
    theirs.save_pretrained(tmp_path / "alone")
    theirs.save_pretrained(tmp_path / "pipeline" / "scheduler")
    told = json.loads((tmp_path / "alone" / "scheduler_config.json").read_text())
    return theirs, tmp_path / "alone", tmp_path / "pipeline", told, config


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_betas(name, tmp_path):
    for options in ({}, {"rescale_betas_zero_snr": True})[: 1 + (name in ZERO_SNR)]:
        theirs = scheduler(name, **options)
        *sources, config = ways(theirs, tmp_path)
        for source in (*sources, {"_class_name": f"{name}Scheduler", **options}):
            ours = from_diffusers(source)
            assert isinstance(ours, NoiseSchedule)
            torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod.float(), rtol=1e-3, atol=1e-6)
            assert NoiseSchedule.from_diffusers(source) == ours
        if options:  # ᾱ_T is that class's own
            last = float(theirs.alphas_cumprod[-1])
            assert float(ours.alphas_cumprod[-1]) == pytest.approx(last, rel=1e-6, abs=1e-12)
        elif "beta_schedule" in config:
            assert from_diffusers(config) == ours


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"])
def test_flows(name, shift, tmp_path):
    *sources, config = ways(scheduler(name, shift=shift), tmp_path)
    for source in sources + [config] * (name != "FlowMatchHeunDiscrete"):
        assert from_diffusers(source) == FlowSchedule(shift)
        assert prediction_from_diffusers(source) == "flow_prediction" == FlowSchedule.default_prediction
        with pytest.raises(ValueError, match=r"flow.*from_diffusers"):
            NoiseSchedule.from_diffusers(source)


@pytest.mark.parametrize("name", FLOWING)
def test_solvers_that_walk_a_flow(name, tmp_path):
    theirs = scheduler(name, use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    for source in ways(theirs, tmp_path):
        assert from_diffusers(source) == FlowSchedule(5.0)
        assert prediction_from_diffusers(source) == "flow_prediction"


def test_sd3_s_list():
    """Published with SD3: shift 3, and the least σ shifted twice."""
    got = [level.sigma for level in spaced(FlowSchedule(3.0), 28, spacing="sd3")]
    assert [round(sigma, 4) for sigma in got[-3:]] == [0.1109, 0.0089, 0]
    for shift, steps in ((3.0, 28), (3.0, 1), (1.0, 7), (6.0, 4)):
        theirs = scheduler("FlowMatchEulerDiscrete", shift=shift)
        theirs.set_timesteps(steps)
        chosen = spaced(FlowSchedule(shift), steps, spacing="sd3")
        np.testing.assert_allclose([level.sigma for level in chosen], theirs.sigmas, atol=2e-7)
        np.testing.assert_allclose([level.t for level in chosen[:-1]], theirs.timesteps, rtol=1e-6)


@pytest.mark.parametrize("how", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_a_shift_that_depends_on_the_image(how, terminal):
    """FLUX's, Qwen-Image's and LTX's configurations: μ by the number of tokens, and the end stretched."""
    theirs = scheduler(
        "FlowMatchEulerDiscrete", use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        time_shift_type=how, shift_terminal=terminal,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler.*tokens"):
        from_diffusers(theirs)
    ours = from_diffusers(theirs, tokens=2048)
    mu = 0.95 + (2.05 - 0.95) / (4096 - 1024) * (2048 - 1024)
    assert ours.shift == pytest.approx(math.exp(mu) if how == "exponential" else mu)
    for steps in (2, 9, 20):
        theirs.set_timesteps(steps, sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        np.testing.assert_allclose([level.sigma for level in spaced(ours, steps)], theirs.sigmas, atol=3e-7)
        theirs.set_timesteps(steps, mu=mu)
        chosen = [level.sigma for level in spaced(ours, steps, spacing="linspace")]
        np.testing.assert_allclose(chosen, theirs.sigmas, atol=3e-7)
    # diffusers divides 0 by 0 here.
    assert [level.sigma for level in spaced(ours, 1)] == [1, 0]


def test_edm(tmp_path):
    for name in ("EDMEuler", "EDMDPMSolverMultistep"):
        *sources, config = ways(scheduler(name, sigma_max=40.0, sigma_data=0.6), tmp_path)
        with pytest.raises(ValueError, match="the scheduler itself"):
            from_diffusers(config)
        for source in sources:
            assert from_diffusers(source) == EDMSchedule(0.002, 40.0, 0.6)
            assert prediction_from_diffusers(source) == "edm" == EDMSchedule.default_prediction
    assert from_diffusers({"_class_name": "EDMEulerScheduler"}) == EDMSchedule()
    with pytest.raises(ValueError, match="v_prediction"):
        prediction_from_diffusers({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"})


def test_stable_video_diffusion(tmp_path):
    """EulerDiscrete that tells its network ¼ ln σ: EDM's process with σ_data = 1 and v, diffusers' picture too."""
    config = {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True,
              "sigma_min": 0.002, "sigma_max": 700.0, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
              "beta_end": 0.012}  # fmt: skip
    theirs = scheduler("EulerDiscrete", **config)
    for source in ways(theirs, tmp_path):
        assert from_diffusers(source) == EDMSchedule(0.002, 700.0, 1.0)
        assert prediction_from_diffusers(source) == "v_prediction"
    theirs.set_timesteps(6)
    x = torch.ones(1, 2) * float(theirs.init_noise_sigma)
    z = x / 700
    for t in theirs.timesteps:
        x = theirs.step(torch.tanh(theirs.scale_model_input(x, t)) + t / 9, t, x).prev_sample
    seen = []

    def network(x, t):
        seen.append(float(t[0]))
        return torch.tanh(x) + t[:, None] / 9

    ours = fastdiff.sample(
        network, (1, 2), sampler="euler", steps=6, schedule=from_diffusers(theirs), prediction="v_prediction",
        x_T=z * fastdiff.samplers.euler(from_diffusers(theirs), 6).init_sigma,
    )  # fmt: skip
    np.testing.assert_allclose(seen, theirs.timesteps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NONE)
def test_what_no_schedule_expresses_names_its_class(name):
    for read in (from_diffusers, NoiseSchedule.from_diffusers):
        with pytest.raises(ValueError, match=f"{name}Scheduler"):
            read({"_class_name": f"{name}Scheduler", "num_train_timesteps": 1000, "trained_betas": None})


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, "_class_name"),
        ({"num_train_timesteps": 1000}, "_class_name"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "tokens"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1.0}, "shift"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 1.5}, "shift_terminal"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 100.0}, "sigma_min"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "laplace"),
    ],
)
def test_refuses(config, names):
    with pytest.raises(ValueError, match=names):
        from_diffusers(config)


def test_tokens_go_with_a_dynamic_shift_alone():
    for config in ({"_class_name": "DDPMScheduler"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}):
        with pytest.raises(ValueError, match="tokens"):
            from_diffusers(config, tokens=256)


def test_a_table_without_a_class():
    assert from_diffusers({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}) == (
        NoiseSchedule.scaled_linear()
    )
    assert len(from_diffusers({"trained_betas": [0.1, 0.2]})) == 2
