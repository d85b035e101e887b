"""Arguments that samplers share, in words: ``describe`` adds them to the docstrings, which tell of their own alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

SHARED = {
    "schedule": "a NoiseSchedule, EDMSchedule or FlowSchedule.",
    "steps": "network calls; None visits every timestep of a NoiseSchedule.",
    "prediction": "what the network predicts (``schedules.level.x0_terms``).",
    "clip": "the bound of |x̂_0|, None for none.",
    "spacing": "where to stop, a name or a ``Spacing``; None is the schedule's own: trailing, or karras for EDM.",
    "solver_type": """how the slope of order 2 enters: "midpoint" (half the step, as published), "heun" (integrated) or
        "exact", which integrates order 3's parabola, too.""",
    "lower_order_final": "in fewer than 15 steps the last is first order and the one before it at most second.",
    "euler_at_final": "the last step is first order in any number. It always is where it ends without noise.",
    "eta": "0 ≤ η ≤ 1, the share of the SDE's noise.",
    "s_noise": "a factor of the noise.",
    "original_inference_steps": """the timesteps of a NoiseSchedule that the network was distilled on, of which some are
        visited (``lcm.distilled_timesteps``), unless ``spacing`` says otherwise.""",
}
RAISES = "Raises:\n    TypeError, ValueError: for arguments outside these."


def describe(sampler: Callable[..., Any]) -> None:
    """Add to a sampler's docstring the shared arguments that it takes and does not itself explain."""
    if sampler.__doc__ is None:  # python -OO
        return
    told, _, raises = inspect.cleandoc(sampler.__doc__).partition("\n\nRaises:\n")
    about, _, own = told.partition("\n\nArgs:\n")
    missing = [
        f"    {name}: {SHARED[name]}"
        for name in inspect.signature(sampler).parameters
        if name in SHARED and not re.search(rf"(^ +|, |[.;] ){name}(, \w+)*: ", own, re.MULTILINE)
    ]
    arguments = "\n".join([*missing, *filter(None, [own])])
    raised = f"Raises:\n{raises}" if raises else RAISES
    sampler.__doc__ = f"{about}\n\nArgs:\n{arguments}\n\n{raised}\n"
