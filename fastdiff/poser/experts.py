"""Experts: what turns pictures, or nothing, and commands into pictures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.checks import check_choice
from fastdiff.poser.domain import Domain
from fastdiff.poser.records import KINDS, REMOTE, Spec


class Expert(Protocol):
    spec: Spec

    def run(self, images: Tensor | None, commands: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures, float32 [B, 3, H, W] in [-1, 1], one a command.

        images: [B, 3, H, W] to change; None for an expert that draws. seeds: in [0, 2⁶⁴), one each, which local
        experts follow whatever is in the batch beside. Raises ExpertError where a call fails.
        """
        ...


def make_expert(spec: Spec, domain: Domain, device: str = "auto") -> Expert:
    """The expert of a spec. ValueError names what its kind lacks."""
    check_choice(f"kind of {spec.name}", spec.kind, KINDS)
    if spec.kind.startswith("simulated"):
        from fastdiff.poser.simulated import SimulatedExpert

        return SimulatedExpert(spec, domain)
    if spec.kind in REMOTE:
        from fastdiff.poser.remote import RemoteExpert

        return RemoteExpert(spec)
    if not spec.source:
        raise ValueError(f"source of {spec.name} must be given: what fastdiff.load takes, or a folder of diffusers'")
    if spec.kind.startswith("diffusers"):
        return DiffusersExpert(spec, device)
    return LocalExpert(spec, device)


def make_experts(specs: Sequence[Spec], domain: Domain, device: str = "auto") -> list[Expert]:
    """The experts of specs, less those that are optional and whose source is missing, of which a warning tells."""
    made: list[Expert] = []
    missing: dict[str, list[str]] = {}
    for spec in specs:
        try:
            made.append(make_expert(spec, domain, device))
        except FileNotFoundError as error:
            if not spec.optional:
                raise FileNotFoundError(f"source of {spec.name}: {error}") from None
            missing.setdefault(str(error), []).append(spec.name)
    for why, names in missing.items():
        warnings.warn(f"left out: {', '.join(names)}: {why}", stacklevel=3)
    return made


class LocalExpert:
    """A pipeline of ``fastdiff.load``: text to image ("draw"), an editor by instruction ("edit"), SDEdit
    ("image-to-image": its options may have a strength) or filling in a box ("inpaint").
    """

    def __init__(self, spec: Spec, device: str = "auto") -> None:
        self.spec, self.pipe = spec, _loaded(spec.source, device, spec.dtype)
        if self.pipe.edits != (spec.kind == "edit"):
            does = "edits by instruction" if self.pipe.edits else "draws from captions"
            raise ValueError(f"kind of {spec.name} is {spec.kind!r}, but {spec.source} {does}")
        if spec.kind == "inpaint":
            top, left, bottom, right = spec.box
            if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
                raise ValueError(f"box of {spec.name} must be (top, left, bottom, right) in [0, 1]; got {spec.box}")

    def run(self, images: Tensor | None, commands: Sequence[str], seeds: Sequence[int]) -> Tensor:
        given: dict[str, Any] = {} if self.spec.kind == "draw" or images is None else {"image": images}
        if self.spec.kind == "inpaint" and images is not None:
            given["mask"] = self._kept(images)
        return self.pipe(list(commands), seeds=list(seeds), **given, **self.spec.options).float().cpu()

    def _kept(self, images: Tensor) -> Tensor:
        """bool [H, W], False in the box."""
        kept = torch.ones(images.shape[-2:], dtype=torch.bool)
        height, width = kept.shape
        top, left, bottom, right = self.spec.box
        kept[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = False
        return kept


class DiffusersExpert:
    """Any pipeline of diffusers' that takes a prompt ("diffusers"), or a prompt and an image ("diffusers-edit")."""

    def __init__(self, spec: Spec, device: str = "auto") -> None:
        if find_spec("diffusers") is None:
            raise ImportError(f'{spec.name} needs diffusers: pip install "fastdiff-torch[text]"')
        from diffusers import DiffusionPipeline

        from fastdiff.checks import named_device

        self.spec = spec
        self.pipe = DiffusionPipeline.from_pretrained(
            spec.source,
            local_files_only=True,
            dtype=getattr(torch, spec.dtype, None),  # "auto" has none
        ).to(named_device(device))
        self.pipe.set_progress_bar_config(disable=True)

    def run(self, images: Tensor | None, commands: Sequence[str], seeds: Sequence[int]) -> Tensor:
        from fastdiff.text.inputs import picture

        given: dict[str, Any] = {} if images is None else {"image": images / 2 + 0.5}  # diffusers' own are in [0, 1]
        generators = [torch.Generator("cpu").manual_seed(seed % (1 << 63)) for seed in seeds]
        with torch.no_grad():
            drawn = self.pipe(list(commands), generator=generators, output_type="pil", **given, **self.spec.options)
        return picture("images", list(drawn.images), (self.spec.size, self.spec.size))


@cache
def _loaded(source: str, device: str, dtype: str) -> Any:
    """One pipeline a source, however many experts draw with it."""
    import fastdiff

    pipe = fastdiff.load(source, device=device, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    if not isinstance(pipe, fastdiff.Pipeline):
        raise ValueError(f"{source} is a {type(pipe).__name__}, which fastdiff.load hands on: its kind is 'diffusers'")
    return pipe
