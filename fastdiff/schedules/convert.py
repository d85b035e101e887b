"""The schedule that a diffusers scheduler's config is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastdiff.checks import check_choice, check_int
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule
from fastdiff.schedules.diffusers_config import class_of, kind, read
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.level import Schedule

_SHIFTS = ("exponential", "linear")


def from_diffusers(scheduler: Any, *, tokens: int | None = None) -> Schedule:
    """The schedule of a diffusers scheduler, of its config (a mapping), or of a folder with scheduler_config.json.

    A table of betas is a NoiseSchedule; FlowMatch classes, and solvers with ``use_flow_sigmas``, are a FlowSchedule
    with their shift and ``shift_terminal``; EDM classes, and Stable Video Diffusion's EulerDiscreteScheduler, which
    tells its network ¼ ln σ, are an EDMSchedule. What a network trained on it predicts is the schedule's
    ``default_prediction``, or the config's own word (``schedules.prediction_from_diffusers``). Where a sampler stops is
    no part of a schedule: the config's spacing, and its sampler, are yours to choose.

    Args:
        scheduler: the scheduler, its config, the folder (a pipeline's, too) or the file. A config need not name its
            class (``scheduler.config`` does not) where its keys say what it is: tables' and FlowMatch's do.
        tokens: for a flow whose shift depends on the image (``use_dynamic_shifting``): how many tokens the transformer
            is given, H·W/4 of latents in patches of 2 × 2.

    Raises:
        TypeError, FileNotFoundError, ValueError: for what is no scheduler; for a class whose process none of the three
            expresses (ScoreSdeVe, consistency, IPNDM …), naming it; for dynamic shifting without ``tokens``.
    """
    config = read(scheduler)
    found = kind(config)
    if tokens is not None and not (found == "flow" and config.get("use_dynamic_shifting")):
        raise ValueError("tokens goes with a flow of use_dynamic_shifting alone; this config has none")
    if found == "betas":
        return NoiseSchedule.from_diffusers(config)
    return _flow(config, tokens) if found == "flow" else _edm(config)


def _flow(config: Mapping[str, Any], tokens: int | None) -> FlowSchedule:
    T = check_int("num_train_timesteps", config.get("num_train_timesteps", 1000), 1, (1 << 24) - 1)
    terminal = config.get("shift_terminal") or None
    if not config.get("use_dynamic_shifting"):
        name = "flow_shift" if config.get("use_flow_sigmas") else "shift"
        shift = config.get(name)
        return FlowSchedule(1.0 if shift is None else shift, T, terminal)
    if tokens is None:
        raise ValueError(f"the shift of this {class_of(config)}Scheduler depends on the image's size: give tokens=")
    how = config.get("time_shift_type", "exponential")
    check_choice("time_shift_type", how, _SHIFTS)
    given = {ours: config[theirs] for ours, theirs in
             (("base_shift", "base_shift"), ("max_shift", "max_shift"), ("base_tokens", "base_image_seq_len"),
              ("max_tokens", "max_image_seq_len")) if config.get(theirs) is not None}  # fmt: skip
    return FlowSchedule.for_tokens(tokens, T=T, time_shift_type=how, shift_terminal=terminal, **given)


def _edm(config: Mapping[str, Any]) -> EDMSchedule:
    low, high, data = (config.get(name) for name in ("sigma_min", "sigma_max", "sigma_data"))
    if config.get("timestep_type") != "continuous":
        low, high, data = (d if v is None else v for v, d in ((low, 0.002), (high, 80.0), (data, 0.5)))
        return EDMSchedule(low, high, data)
    if low is None or high is None:  # the σ of its table of betas, to which timestep_type adds ¼ ln σ
        table = NoiseSchedule.from_diffusers({**config, "timestep_type": "discrete"})
        low, high = table.sigma_min if low is None else low, table.sigma_max if high is None else high
        if not math.isfinite(high):
            raise ValueError("timestep_type='continuous' needs a finite σ_max; the table's ᾱ reaches 0")
    return EDMSchedule(low, high, 1.0)  # the network is shown x/√(σ² + 1) and predicts v
