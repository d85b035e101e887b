"""A diffusers pipeline's schedulers and networks on the fast path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdiff.acceleration.network import RECORD, Network, install, network_of, networks_in
from fastdiff.acceleration.report import Accelerated, NetworkReport, class_name

# Components that run once a prompt or once an image beside the network, and are left to their own library.
BESIDE = ("text_encoder", "image_encoder", "safety_checker", "feature_extractor", "prior_text", "image_normalizer")

ENCODERS = ("text_encoder", "image_encoder")  # of them, those that a batch-invariant pipeline calls sample by sample

# Pipelines that edit a scheduler's past outputs.
EDITING = ("ChronoEditPipeline", "LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL")


class Asked(NamedTuple):
    """The arguments of ``accelerate``."""

    dtype: torch.dtype | str
    exact: bool
    invariant: bool


@dataclass
class Record:
    """What was put into a pipeline, by which arguments; kept on the pipeline itself."""

    arguments: Asked
    schedulers: dict[str, tuple[Any, Any]]  # what was there, and ours
    networks: list[Network]  # that this pipeline's accelerate changed
    report: Accelerated
    components: list[int]  # the identities of all that the pipeline had then


def accelerate(
    pipe: Any,
    accelerate_network: Callable[[nn.Module, Asked], Accelerated],
    remove: Callable[[Network], None],
    asked: Asked,
) -> Accelerated:
    """``fastdiff.accelerate`` for a pipeline, which is begun anew where a component was exchanged since."""
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from fastdiff.integrations import diffusers as ours

    record = pipe.__dict__.get(RECORD)
    if record is not None:
        if record.arguments == asked and record.components == _components(pipe):
            return record.report
        if record.arguments == asked:  # something was exchanged since
            restore(pipe, record, remove)
            return accelerate(pipe, accelerate_network, remove, asked)
        raise ValueError(f"this {type(pipe).__name__} is accelerated already, with other arguments; restore it first")
    kept: dict[str, str] = {}
    schedulers = {}
    for name, scheduler in pipe.components.items():
        if isinstance(scheduler, SchedulerMixin):
            try:
                new = ours.like(scheduler)
            except (ValueError, NotImplementedError) as error:
                kept[name] = f"{class_name(scheduler)}, since {error}"
                continue
            if new is None:
                kept[name] = f"{class_name(scheduler)}, since {ours.reason(scheduler)}"
                continue
            why = _unserved(pipe, new) or ours.unserved(new)
            if why is None:
                schedulers[name] = scheduler, new
            else:
                kept[name] = f"{class_name(scheduler)}, since {why}"
    reports: dict[str, NetworkReport] = {}
    networks: list[Network] = []
    for name, network in _networks(pipe).items():
        if asked.invariant and name.startswith(ENCODERS) and network_of(network) is None:
            networks.append(install(network, kinds={}, invariant=True))
            reports[name] = networks[-1].report()
            continue
        if name.startswith(BESIDE):
            kept[name] = f"{class_name(network)}, which runs beside the steps"
            continue
        before = network_of(network)
        try:
            reports[name] = accelerate_network(network, asked).networks[""]
        except ValueError as error:
            if asked.invariant:  # a promise that one of them breaks is none
                for put in networks:
                    remove(put)
                raise
            kept[name] = f"{class_name(network)}, since {error}"
            continue
        if before is None:
            networks.append(networks_in(network)[0])
    if not schedulers and not reports:
        found = "; ".join(f"{name} is {what}" for name, what in kept.items()) or "it has no scheduler"
        raise ValueError(f"fastdiff has nothing for this {type(pipe).__name__}: {found}")
    for name, (_, new) in schedulers.items():
        setattr(pipe, name, new)
    changed = {name: (class_name(old), class_name(new)) for name, (old, new) in schedulers.items()}
    report = Accelerated(class_name(pipe), changed, kept, reports)
    pipe.__dict__[RECORD] = Record(asked, schedulers, networks, report, _components(pipe))
    return report


def restore(pipe: Any, record: Record, remove: Callable[[Network], None]) -> None:
    """``fastdiff.restore`` for a pipeline: a scheduler that was exchanged since stays."""
    for network in record.networks:
        if network_of(network.root) is network:
            remove(network)
    for name, (old, new) in record.schedulers.items():
        if getattr(pipe, name, None) is new:
            setattr(pipe, name, old)
    del pipe.__dict__[RECORD]


def _unserved(pipe: Any, scheduler: Any) -> str | None:
    """Why our scheduler cannot stand in this pipeline; None where it can."""
    if type(pipe).__name__ in EDITING and hasattr(scheduler, "model_outputs"):
        return "this pipeline edits the scheduler's model_outputs, which ours does not read"
    from_the_middle = "strength" in inspect.signature(type(pipe).__call__).parameters
    if from_the_middle and scheduler.config.get("skip_prk_steps") is False:
        return "ours begins in the middle of its list with skip_prk_steps=True alone"
    return None


def _components(pipe: Any) -> list[int]:
    return [id(value) for value in pipe.components.values()]


def _networks(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's networks by name; of a compiled one the module itself, of several ControlNets each."""
    found: dict[str, nn.Module] = {}
    for name, value in pipe.components.items():
        if not isinstance(value, nn.Module):
            continue
        network: Any = getattr(value, "_orig_mod", value)
        if type(network).__name__.startswith("Multi") and hasattr(network, "nets"):
            found |= {f"{name}.{i}": net for i, net in enumerate(network.nets)}
        else:
            found[name] = network
    return found
