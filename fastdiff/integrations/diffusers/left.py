"""diffusers' schedulers that fastdiff leaves as they are, and why."""

from __future__ import annotations

from typing import Any

_TOKENS = "its states are tokens, which no linear combination moves"
_PARALLEL = "it steps many timesteps of one image in a batch, a row has one"
_YET = "it is not served yet"

REASONS = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "DDIMParallelScheduler": _PARALLEL,
    "DDPMParallelScheduler": _PARALLEL,
    "ScoreSdeVeScheduler": "its corrector's steps are as long as the network's output says, not numbers of a plan",
    "KarrasVeScheduler": "its pipeline adds the noise and mends the step by calls of their own",
    "RePaintScheduler": "it goes back by a call of its own; samplers.repaint is the method as a plan",
    "CMStochasticIterativeScheduler": _YET,
    "FlowMapEulerDiscreteScheduler": _YET,
    "HeliosScheduler": _YET,
    "HeliosDMDScheduler": _YET,
    "LTXEulerAncestralRFScheduler": _YET,
    "MiniMaxH3Scheduler": _YET,
    "PiflowScheduler": _YET,
    "RFD4ProteinaScheduler": _YET,
}


def reason(scheduler: Any) -> str:
    """Why ``like`` has no scheduler for this one."""
    return REASONS.get(type(scheduler).__name__, "it is a class of its own, whose steps fastdiff does not know")
