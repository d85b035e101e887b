"""diffusers' schedulers, each step of which is one fused update: put ours where theirs stood.

    from fastdiff.integrations.diffusers import DPMSolverMultistepScheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)   # or fastdiff.accelerate(pipe)

Constructors, configs, loading and saving, lists of timesteps and results are diffusers' own, and so are the numbers,
to 1e-5 with the same torch generator; where they differ, the class says so. ``use_fastdiff_noise`` takes the steps'
noise from fastdiff's stream instead, drawn inside the update. A step does not wait for the device.
"""

from fastdiff.integrations.diffusers.sigmas import (
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
)
from fastdiff.integrations.diffusers.solvers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
from fastdiff.integrations.diffusers.vp import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)

SCHEDULERS = {
    cls.__name__: cls
    for cls in (
        DDPMScheduler, DDIMScheduler, DDIMInverseScheduler, PNDMScheduler, EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler, DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler, EDMEulerScheduler,
        FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler,
    )
}  # fmt: skip

__all__ = ["SCHEDULERS", *SCHEDULERS]
