"""Classifier-free guidance: one network call for the unconditional and the conditional output (Ho & Salimans 2022).

A guidance interval (Kynkäänniemi et al. 2024) leaves the rows outside of it to one conditional call; two scales
(InstructPix2Pix, Brooks et al. 2023) stack three calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastdiff.plan.plan import COLUMNS, Plan, guidance_weights

W0, P, Q = (COLUMNS.index(name) for name in ("w0", "p", "q"))


@dataclass(frozen=True)
class Guidance:
    """How many times the batch is stacked, with which keywords, and the weights of the outputs.

    ``plain`` are the keywords of a conditional call alone, ``kwargs`` those of the stacked one.
    """

    calls: int = 1
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    rescale: float = 0.0
    plain: Mapping[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] | None = None

    def row_calls(self, plan: Plan) -> tuple[int, ...]:
        """The stacked calls of each row: 0 where it makes none, 1 outside of the interval."""
        return _row_calls(plan, self.calls, self.interval)

    def gain(self, conditional: Tensor, guided: Tensor, out: Tensor) -> None:
        """Write φ·std(conditional)/std(guided) + 1 − φ of each sample to ``out`` (Lin et al. 2024, Equations 15–16).

        1 where the guided output is constant and so has no scale to restore.
        """
        if guided.shape[1] < 2:
            out.fill_(1.0)
            return
        spread = guided.std(dim=1)
        ratio = torch.where(spread == 0, 1.0, conditional.std(dim=1) / spread)
        torch.add(self.rescale * ratio, 1 - self.rescale, out=out)


@lru_cache(maxsize=64)
def _row_calls(plan: Plan, calls: int, interval: tuple[float, float] | None) -> tuple[int, ...]:
    return tuple((calls if row.is_guided(interval) else 1) if row.calls_model else 0 for row in plan)


def mixed(outputs: Sequence[Tensor], row: Tensor) -> Tensor:
    """The guided output [B, n], float32, of a row of the device's table."""
    wide = [output.reshape(len(output), -1).to(torch.float32) for output in outputs]
    if len(wide) == 1:
        return wide[0]
    m = wide[0] * row[W0]
    for k, output in enumerate(wide[1:], start=1):
        m = m + output * row[W0 + k]
    return m


def resolve_guidance(
    batch: int,
    model_kwargs: Mapping[str, Any] | None,
    uncond_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    scale: float | Sequence[float],
    rescale: float,
    interval: Sequence[float] | None = None,
) -> Guidance:
    """The guidance of ``sample``'s arguments."""
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"model_kwargs must be a mapping; got {type(model_kwargs).__name__}")
    if isinstance(rescale, bool) or not isinstance(rescale, (int, float)) or not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must be a number in [0, 1]; got {rescale!r}")
    if uncond_kwargs is interval is None and type(scale) is float and scale == 1 and rescale == 0:
        return Guidance(1, dict(model_kwargs or {}), plain=dict(model_kwargs or {}))
    weights = guidance_weights(scale)
    limits = None if interval is None else _interval(interval)
    kwargs = dict(model_kwargs or {})
    if uncond_kwargs is None:
        if limits is not None:
            raise ValueError("guidance_interval needs uncond_kwargs, the unconditional call's keywords")
        if any(weights[:-1]):
            warnings.warn(
                f"guidance_scale={scale} has no effect without uncond_kwargs: the network is called once",
                stacklevel=4,  # where sample was called
            )
        if rescale:
            raise ValueError(f"guidance_rescale={rescale} needs uncond_kwargs, the unconditional call's keywords")
        return Guidance(1, kwargs, plain=kwargs)
    several = _several(uncond_kwargs, len(weights) - 1)
    for name, uncond in several.items():
        unknown = sorted(set(uncond) - set(kwargs))
        if unknown:
            raise ValueError(f"{name} has {', '.join(unknown)}, which model_kwargs lacks")
    if all(w == 0 for w in weights[:-1]):
        return Guidance(1, kwargs, plain=kwargs)
    merged = {name: _merge(name, several, value, batch) for name, value in kwargs.items()}
    return Guidance(len(weights), merged, weights, float(rescale), kwargs, limits)


def _interval(interval: Sequence[float]) -> tuple[float, float]:
    if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
        raise TypeError(f"guidance_interval must be a pair (low, high) of σ/α; got {interval!r}")
    if any(isinstance(v, bool) or not isinstance(v, Real) for v in interval):
        raise TypeError(f"guidance_interval must hold two numbers; got {interval!r}")
    low, high = (float(v) for v in interval)
    if not 0 <= low < high:
        raise ValueError(f"guidance_interval must be 0 <= low < high; got {interval!r}")
    return low, high


def _several(uncond_kwargs: Any, count: int) -> dict[str, Mapping[str, Any]]:
    """The unconditional calls' keywords by the name to complain of."""
    single = isinstance(uncond_kwargs, Mapping)
    if not single and (not isinstance(uncond_kwargs, Sequence) or isinstance(uncond_kwargs, str)):
        raise TypeError(f"uncond_kwargs must be a mapping, or two; got {type(uncond_kwargs).__name__}")
    given = [uncond_kwargs] if single else list(uncond_kwargs)
    for kwargs in given:
        if not isinstance(kwargs, Mapping):
            raise TypeError(f"uncond_kwargs must be a mapping, or two; got one of {type(kwargs).__name__}")
    if len(given) != count:
        raise ValueError(
            f"uncond_kwargs must be {'one mapping for one guidance_scale' if count == 1 else 'two mappings for a pair'}"
            f"; got {len(given)}"
        )
    return {"uncond_kwargs" if single else f"uncond_kwargs[{i}]": kwargs for i, kwargs in enumerate(given)}


def _merge(name: str, several: Mapping[str, Mapping[str, Any]], cond: Any, batch: int) -> Any:
    """[uncond, …, cond] for tensors of B entries; the value itself where all are equal."""
    unconds = [(f"{whose}[{name!r}]", uncond.get(name, cond)) for whose, uncond in several.items()]

    def stacks(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch

    if stacks(cond) and all(stacks(value) for _, value in unconds):
        for whose, value in unconds:
            if value.shape != cond.shape or value.dtype != cond.dtype:
                raise ValueError(
                    f"{whose} must match model_kwargs[{name!r}], {cond.dtype} {list(cond.shape)}; "
                    f"got {value.dtype} {list(value.shape)}"
                )
        return torch.cat([*(value for _, value in unconds), cond])
    for whose, value in sorted(unconds, key=lambda named: stacks(named[1])):
        tensors = [isinstance(v, Tensor) for v in (value, cond)]
        same = torch.equal(value, cond) if all(tensors) else not any(tensors) and bool(value == cond)
        if not same:
            raise ValueError(
                f"{whose} differs from model_kwargs[{name!r}], but is no tensor of {batch} entries: "
                "it cannot be stacked for one call"
            )
    return cond
