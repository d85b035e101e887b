"""Samplers by the names that people type: other programs' spellings, with the spacing that such a name may say."""

from __future__ import annotations

import re

from fastdiff.checks import nearest
from fastdiff.samplers import SAMPLERS
from fastdiff.schedules.spacing import NAMES

# Squeezed names (lower case, letters and digits alone, "++" as "pp") that are not squeezed names of ours.
ALIASES = {
    "eulera": "euler_ancestral",
    "dpm2a": "dpm2_ancestral",
    "dpmpp2sa": "dpmpp_2s_ancestral",
    "plms": "pndm",
    "unipcbh2": "unipc",
}

# diffusers' classes. Their timesteps are their configuration's, so these names are answered, not understood.
SCHEDULERS = {
    "DDPMScheduler": "'ddpm'",
    "DDIMScheduler": "'ddim'",
    "DDIMParallelScheduler": "'ddim'",
    "DDPMParallelScheduler": "'ddpm'",
    "DDIMInverseScheduler": "'ddim_inverse'",
    "PNDMScheduler": "'pndm'",
    "LMSDiscreteScheduler": "'lms' with spacing='linspace'",
    "EulerDiscreteScheduler": "'euler' with spacing='linspace'",
    "EulerAncestralDiscreteScheduler": "'euler_ancestral' with spacing='linspace'",
    "HeunDiscreteScheduler": "'heun' with spacing='linspace'",
    "KDPM2DiscreteScheduler": "'dpm2' with spacing='linspace'",
    "KDPM2AncestralDiscreteScheduler": "'dpm2_ancestral' with spacing='linspace'",
    "DPMSolverMultistepScheduler": "'dpmpp_2m' with spacing='linspace'",
    "DPMSolverSinglestepScheduler": "'dpm_singlestep'",
    "DPMSolverSDEScheduler": "'dpmpp_sde' with spacing='linspace'",
    "UniPCMultistepScheduler": "'unipc' with spacing='linspace'",
    "DEISMultistepScheduler": "'deis' with spacing='linspace'",
    "IPNDMScheduler": "'ipndm'",
    "SASolverScheduler": "'sa_solver' with spacing='linspace'",
    "LCMScheduler": "'lcm'",
    "TCDScheduler": "'tcd'",
    "RePaintScheduler": "'repaint'",
    "CogVideoXDDIMScheduler": "'ddim'",
    "CogVideoXDPMScheduler": "'dpmpp_2m_sde'",
    "EDMEulerScheduler": "'euler' with schedule='edm', prediction='edm'",
    "EDMDPMSolverMultistepScheduler": "'dpmpp_2m' with schedule='edm', prediction='edm'",
    "FlowMatchLCMScheduler": "'lcm' with schedule='flow', prediction='flow_prediction'",
    "FlowMatchEulerDiscreteScheduler": "'euler' with schedule='flow', prediction='flow_prediction'",
    "FlowMatchHeunDiscreteScheduler": "'heun' with schedule='flow', prediction='flow_prediction'",
}


def understood(name: str) -> tuple[str, str | None]:
    """(sampler, the spacing that the name says or None): "DPM++ 2M Karras", "euler a", "sample_dpmpp_2m", "k_heun".

    Raises ValueError for a name that none of ours is, saying which may be meant.
    """
    if name in SAMPLERS:
        return name, None
    if name in SCHEDULERS:
        raise ValueError(
            f"sampler is {name!r}, a scheduler of diffusers; did you mean {SCHEDULERS[name]}? "
            "fastdiff.integrations.diffusers has schedulers in place of diffusers' own"
        )
    if name == "tuned":
        raise ValueError(
            "sampler is 'tuned', a plan learned for one model: load(folder).arguments(sampler='tuned', steps=n) takes "
            "it from the model's folder, Plan.load(file) from a file"
        )
    squeezed, known = _squeezed(name), ALIASES | {_squeezed(sampler): sampler for sampler in SAMPLERS}
    for spacing in (None, *sorted(NAMES, key=len, reverse=True)):
        said = "" if spacing is None else _squeezed(spacing)
        if not squeezed.endswith(said):
            continue
        solver = squeezed.removesuffix(said).removesuffix("gpu")
        for spelling in (solver, solver.removeprefix("sample"), solver.removeprefix("k")):
            if spelling in known:
                return known[spelling], spacing
    raise ValueError(f"sampler is {name!r}" + nearest(name.lower().replace("++", "pp"), tuple(SAMPLERS)))


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))
