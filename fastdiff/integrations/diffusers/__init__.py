"""diffusers' schedulers, each step of which is one fused update: put ours where theirs stood.

    from fastdiff.integrations.diffusers import DPMSolverMultistepScheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)   # or fastdiff.accelerate(pipe)

Constructors, configs, loading and saving, lists of timesteps and results are diffusers' own, and so are the numbers,
to 1e-5 with the same torch generator; where they differ, the class says so, and here is what all of them share:
``timesteps``, ``sigmas`` and tables of ᾱ may be replaced or edited in place, and the next step reads them, with
diffusers' result. The timestep −1, one too many, with which diffusers ends some "trailing" lists (61 steps of 1000), is
dropped. A run begins at the first of the list's entries that equal a timestep given as a number or a copy, where theirs
takes the second, and ends a step short.

``use_fastdiff_noise`` takes the steps' noise from fastdiff's stream instead, drawn inside the update. A step does not
wait for the device. ``left.REASONS`` names diffusers' schedulers that are not here, each with the reason.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch

try:
    import diffusers
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise
    raise ImportError(
        'fastdiff.integrations.diffusers needs diffusers: pip install "fastdiff-torch[diffusers]"', name="diffusers"
    ) from error
from diffusers.utils import is_torchsde_available

from fastdiff.integrations.diffusers.base import Stepping
from fastdiff.integrations.diffusers.left import reason
from fastdiff.integrations.diffusers.scheduling_cogvideox import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from fastdiff.integrations.diffusers.scheduling_distilled import LCMScheduler, TCDScheduler
from fastdiff.integrations.diffusers.scheduling_edm_solver import EDMDPMSolverMultistepScheduler
from fastdiff.integrations.diffusers.scheduling_flow import FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from fastdiff.integrations.diffusers.scheduling_inverse import DPMSolverMultistepInverseScheduler
from fastdiff.integrations.diffusers.scheduling_midpoint import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from fastdiff.integrations.diffusers.scheduling_prior import DDPMWuerstchenScheduler, UnCLIPScheduler
from fastdiff.integrations.diffusers.scheduling_sasolver import SASolverScheduler
from fastdiff.integrations.diffusers.scheduling_sigmas import (
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
)
from fastdiff.integrations.diffusers.scheduling_solvers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
from fastdiff.integrations.diffusers.scheduling_trig import IPNDMScheduler, SCMScheduler
from fastdiff.integrations.diffusers.scheduling_vp import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
)

if TYPE_CHECKING or is_torchsde_available():
    from fastdiff.integrations.diffusers.scheduling_brownian import (
        CosineDPMSolverMultistepScheduler,
        DPMSolverSDEScheduler,
    )
else:  # diffusers' stand-ins, whose constructors say what is missing
    from diffusers import CosineDPMSolverMultistepScheduler, DPMSolverSDEScheduler

SCHEDULERS = {
    cls.__name__: cls
    for cls in (
        DDPMScheduler, DDIMScheduler, DDIMInverseScheduler, PNDMScheduler, EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler, DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler, EDMEulerScheduler,
        FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler, KDPM2DiscreteScheduler,
        KDPM2AncestralDiscreteScheduler, DPMSolverSDEScheduler, EDMDPMSolverMultistepScheduler,
        CosineDPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler,
        CogVideoXDDIMScheduler, CogVideoXDPMScheduler, UnCLIPScheduler, DDPMWuerstchenScheduler, SCMScheduler,
        IPNDMScheduler, SASolverScheduler, DPMSolverMultistepInverseScheduler,
    )
    if issubclass(cls, Stepping)
}  # fmt: skip
TABLES = ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod")


def like(scheduler: Any) -> Stepping | None:
    """Our scheduler of diffusers' class, config and tables; None for a class, or a subclass, that we do not have."""
    made = SCHEDULERS.get(type(scheduler).__name__)
    if made is None or type(scheduler) is not getattr(diffusers, made.__name__):
        return None
    # Not as from_config reads a config, which drops what a pipeline corrected in it and says so in this entry.
    ours = made.from_config({k: v for k, v in scheduler.config.items() if not k.startswith("_")})
    ours.register_to_config(_use_default_values=scheduler.config.get("_use_default_values", []))
    for name in TABLES:  # which may have been changed by hand
        if name in scheduler.__dict__:
            setattr(ours, name, getattr(scheduler, name))
    return ours


def unserved(scheduler: Stepping) -> str | None:
    """Why one of our schedulers cannot walk a list of ten steps by itself; None where it can."""
    made: Any = copy.deepcopy(scheduler)
    made.use_fastdiff_noise(0)  # torch's generators are left as they are
    x = torch.zeros(1, 3, 2, 2)
    output = torch.cat([x, x], dim=1) if str(made.config.get("variance_type")).startswith("learned") else x
    try:
        made.set_timesteps(10, **({"mu": 1.0} if made.config.get("use_dynamic_shifting") else {}))
    except (AssertionError, TypeError, ValueError):
        return None  # diffusers' own word on such a list
    try:
        if hasattr(made, "scale_model_input"):
            made.scale_model_input(x, made.timesteps[0])
        made._first_step(output, x)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


__all__ = ["SCHEDULERS", "like", "reason", "unserved", *SCHEDULERS]
