"""Names that people type for samplers: understood, or answered with the one that is meant."""

import inspect
import re

import pytest

from fastdiff.samplers import SAMPLERS
from fastdiff.samplers.names import SCHEDULERS, understood

UNDERSTOOD = {
    "DDIM": ("ddim", None),
    "DDPM": ("ddpm", None),
    "ddim_": ("ddim", None),
    "Euler": ("euler", None),
    "Euler a": ("euler_ancestral", None),
    "euler-a": ("euler_ancestral", None),
    "k_euler_a": ("euler_ancestral", None),
    "sample_euler_ancestral": ("euler_ancestral", None),
    "Heun": ("heun", None),
    "DPM2": ("dpm2", None),
    "dpm_2": ("dpm2", None),
    "DPM2 a Karras": ("dpm2_ancestral", "karras"),
    "dpm_2_ancestral": ("dpm2_ancestral", None),
    "LMS Karras": ("lms", "karras"),
    "PLMS": ("pndm", None),
    "DPM++ 2M": ("dpmpp_2m", None),
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "dpm++ 2m beta": ("dpmpp_2m", "beta"),
    "DPM++ 2S a": ("dpmpp_2s_ancestral", None),
    "DPM++ SDE Karras": ("dpmpp_sde", "karras"),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
    "dpmpp_3m_sde_gpu": ("dpmpp_3m_sde", None),
    "sample_dpmpp_2m": ("dpmpp_2m", None),
    "UniPC": ("unipc", None),
    "uni_pc_bh2": ("unipc", None),
    "LCM": ("lcm", None),
    "DPM-Solver 2": ("dpm_solver_2", None),
    "heun polyexponential": ("heun", "polyexponential"),
    "DPM++ 2M SGM Uniform": ("dpmpp_2m", "sgm_uniform"),
    "Euler a simple": ("euler_ancestral", "simple"),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_other_spellings(name):
    assert understood(name) == UNDERSTOOD[name]


def test_our_own_names():
    for name in SAMPLERS:
        assert understood(name) == (name, None)
        assert understood(name.upper().replace("_", " ")) == (name, None)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_diffusers_classes_are_answered(name):
    meant = re.match("'([a-z0-9_]+)'", SCHEDULERS[name])
    assert meant
    assert meant.group(1) in SAMPLERS
    with pytest.raises(ValueError, match=f"a scheduler of diffusers; did you mean {SCHEDULERS[name]}"):
        understood(name)


def test_the_classes_exist_and_have_that_spacing():
    diffusers = pytest.importorskip("diffusers")
    for name, answer in SCHEDULERS.items():
        scheduler = getattr(diffusers, name)
        if "dummy" in scheduler.__module__:  # a stand-in where a library that it needs is missing
            continue
        spacing = inspect.signature(scheduler.__init__).parameters.get("timestep_spacing")
        assert ("spacing='linspace'" in answer) == (spacing is not None and spacing.default == "linspace"), name


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("ddpn", "did you mean 'ddpm'"),
        ("DPM++ 2M Turbo", "did you mean 'dpmpp_2m'"),
        ("nothing alike", "it must be one of ddpm, ddim"),
        ("", "it must be one of"),
        ("karras", "it must be one of"),
    ],
)
def test_unknown_names(name, names):
    with pytest.raises(ValueError, match=re.escape(f"sampler is {name!r}") + f".*{names}"):
        understood(name)
