"""Classifier-free guidance: one network call for the unconditional and the conditional output (Ho & Salimans 2022)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff.plan import guidance_weights


@dataclass(frozen=True)
class Guidance:
    """How many times the batch is stacked, with which keywords, and the weights of the outputs."""

    calls: int = 1
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    rescale: float = 0.0

    def gain(self, outputs: Sequence[Tensor], out: Tensor) -> None:
        """Write φ·std(conditional)/std(guided) + 1 − φ of each sample to ``out`` (Lin et al. 2024, Equations 15–16)."""
        wide = [output.flatten(1).to(torch.float32) for output in outputs]
        guided = sum(w * output for w, output in zip(self.weights, wide, strict=True))
        assert isinstance(guided, Tensor)
        torch.add(self.rescale * wide[-1].std(dim=1) / guided.std(dim=1), 1 - self.rescale, out=out)


def resolve_guidance(
    batch: int,
    model_kwargs: Mapping[str, Any] | None,
    uncond_kwargs: Mapping[str, Any] | None,
    scale: float | Sequence[float],
    rescale: float,
) -> Guidance:
    """The guidance of ``sample``'s arguments."""
    for name, value in (("model_kwargs", model_kwargs), ("uncond_kwargs", uncond_kwargs)):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping; got {type(value).__name__}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"guidance_scale must be a number; got {type(scale).__name__}")
    if isinstance(rescale, bool) or not isinstance(rescale, (int, float)) or not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must be a number in [0, 1]; got {rescale!r}")
    weights = guidance_weights(scale)
    kwargs = dict(model_kwargs or {})
    if uncond_kwargs is None:
        if scale != 1:
            warnings.warn(
                f"guidance_scale={scale} has no effect without uncond_kwargs: the network is called once",
                stacklevel=4,
            )
        return Guidance(1, kwargs)
    unknown = sorted(set(uncond_kwargs) - set(kwargs))
    if unknown:
        raise ValueError(f"uncond_kwargs has {', '.join(unknown)}, which model_kwargs lacks")
    if scale == 1:
        return Guidance(1, kwargs)
    merged = {name: _merge(name, uncond_kwargs.get(name, value), value, batch) for name, value in kwargs.items()}
    return Guidance(2, merged, weights, float(rescale))


def _merge(name: str, uncond: Any, cond: Any, batch: int) -> Any:
    """[uncond, cond] for tensors of B entries; the value itself where both are equal."""
    tensors = [isinstance(value, Tensor) for value in (uncond, cond)]
    if all(tensors) and all(value.ndim and len(value) == batch for value in (uncond, cond)):
        if uncond.shape != cond.shape or uncond.dtype != cond.dtype:
            raise ValueError(
                f"uncond_kwargs[{name!r}] must match model_kwargs[{name!r}], {cond.dtype} {list(cond.shape)}; "
                f"got {uncond.dtype} {list(uncond.shape)}"
            )
        return torch.cat([uncond, cond])
    same = torch.equal(uncond, cond) if all(tensors) else not any(tensors) and bool(uncond == cond)
    if not same:
        raise ValueError(
            f"uncond_kwargs[{name!r}] differs from model_kwargs[{name!r}], but is no tensor of {batch} entries: "
            "it cannot be stacked for one call"
        )
    return cond
