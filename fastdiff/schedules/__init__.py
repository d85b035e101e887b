"""Noise processes as samplers see them (``level``), and where samplers stop on them (``spacing``)."""

from fastdiff.schedules.convert import from_diffusers
from fastdiff.schedules.diffusers_config import prediction_type, read

__all__ = ["from_diffusers", "prediction_from_diffusers"]


def prediction_from_diffusers(scheduler: object) -> str:
    """What the network of a diffusers scheduler (its config, its folder) predicts: ``prediction=`` of ``sample``."""
    return prediction_type(read(scheduler))
