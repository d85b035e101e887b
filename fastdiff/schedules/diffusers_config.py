"""What a diffusers scheduler's config says of its noise process, read without diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.files import read_json_object

# Classes whose process is a table of β, with what their constructors take for keys that a config leaves out.
_PLAIN = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_VIDEO = {**_LATENT, "snr_shift_scale": 3.0}
_KARRAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
_BETAS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "PNDM", "RePaint", "EulerDiscrete",
         "EulerAncestralDiscrete", "LMSDiscrete", "DPMSolverMultistep", "DPMSolverMultistepInverse",
         "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver"), _PLAIN,
    ),
    **dict.fromkeys(("LCM", "TCD"), _LATENT),
    **dict.fromkeys(("CogVideoXDDIM", "CogVideoXDPM"), _VIDEO),
    **dict.fromkeys(("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"), _KARRAS),
    "UnCLIP": {"beta_schedule": "squaredcos_cap_v2"},
}  # fmt: skip
_FLOWS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM")
_EDM = ("EDMEuler", "EDMDPMSolverMultistep")
_KEYS = ("beta_schedule", "trained_betas", "beta_start", "beta_end")
# Classes that replace the ᾱ = 0 of rescale_betas_zero_snr by 2⁻²⁴, so that their σ is finite.
_FLOORED = ("EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep")
FLOOR = 2.0**-24


def read(scheduler: Any) -> dict[str, Any]:
    """The config of a diffusers scheduler, of a mapping, or of a folder (or file) that holds scheduler_config.json.

    An object's class stands in it as ``_class_name``, by the name of diffusers' class that it inherits from.
    Raises TypeError, FileNotFoundError or ValueError.
    """
    if isinstance(scheduler, Mapping):
        return dict(scheduler)
    if hasattr(scheduler, "config"):
        names = [c.__name__ for c in type(scheduler).__mro__]
        known = next((name for name in names if _short(name) in (*_BETAS, *_FLOWS, *_EDM)), names[0])
        return {**dict(scheduler.config), "_class_name": known}
    try:
        path = Path(scheduler)
    except TypeError as error:
        raise TypeError(
            f"scheduler must be a diffusers scheduler, its config or a folder; got {type(scheduler).__name__}"
        ) from error
    file = path / "scheduler_config.json" if path.is_dir() else path
    if path.is_dir() and not file.exists() and (path / "scheduler" / file.name).exists():
        file = path / "scheduler" / file.name  # a pipeline's folder
    try:
        return read_json_object(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"no scheduler_config.json at {path}") from None


def class_of(config: Mapping[str, Any]) -> str:
    """The class that a config names, without "Scheduler"; empty where it names none."""
    name = config.get("_class_name")
    return _short(name) if isinstance(name, str) else ""


def kind(config: Mapping[str, Any]) -> str:
    """What process a config describes: "betas", "flow" or "edm". Raises ValueError, naming the class, for any other."""
    name = class_of(config)
    if config.get("use_flow_sigmas") and (name in _BETAS or not name):
        return "flow"
    if _tells_log_sigma(config, name):
        return "edm"
    if name in _BETAS:
        return "betas"
    if name in _FLOWS:
        if config.get("invert_sigmas"):
            raise ValueError(
                f"a {name}Scheduler with invert_sigmas tells its network 1 − σ, which no schedule here does"
            )
        return "flow"
    if name in _EDM:
        return "edm"
    if not name and any(config.get(key) is not None for key in _KEYS):
        return "betas"
    if not name and "shift" in config and "base_image_seq_len" in config:
        return "flow"
    if not name:
        raise ValueError(
            "the config names neither its class (_class_name) nor a table of betas (beta_schedule): hand over the "
            "scheduler itself, or its folder"
        )
    raise ValueError(
        f"the noise process of {name}Scheduler is no table of betas, no flow and not EDM's, as far as fastdiff knows: "
        "no schedule expresses it"
    )


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A table's config with what its class takes for keys that are missing."""
    return {**_BETAS.get(class_of(config), _PLAIN), **config}


def terminal_floor(config: Mapping[str, Any]) -> float:
    """What the config's class puts in place of ᾱ = 0: 2⁻²⁴ in classes whose states are x_0 + σ ε, and DPM-Solvers."""
    return FLOOR if class_of(config) in _FLOORED else 0.0


def prediction_type(config: Mapping[str, Any]) -> str:
    """What the config's network predicts, by the names of ``schedules.level.PREDICTIONS``.

    A FlowMatch class says nothing of it: flow_prediction. EDM's "epsilon" is F of Karras et al. 2022, here "edm".
    Raises ValueError for an EDM class's v_prediction with sigma_data other than 1, which no prediction here is.
    """
    name, given = class_of(config), config.get("prediction_type")
    if kind(config) == "flow" and (given is None or name in _FLOWS):
        return "flow_prediction"
    if name in _EDM:
        if given == "v_prediction" and config.get("sigma_data", 0.5) == 1:
            return "v_prediction"
        if given not in (None, "epsilon"):
            raise ValueError(f"prediction_type={given!r} of {name}Scheduler is no prediction here; epsilon is edm")
        return "edm"
    return "epsilon" if given is None else given


def _tells_log_sigma(config: Mapping[str, Any], name: str) -> bool:
    """Whether EulerDiscrete tells the network ¼ ln σ: Stable Video Diffusion's configuration."""
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return continuous and name in ("EulerDiscrete", "")


def _short(name: str) -> str:
    return name.removesuffix("Scheduler")
