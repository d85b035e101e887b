"""Classifier-free guidance: one network call for the unconditional and the conditional output (Ho & Salimans 2022).

A guidance interval (Kynkäänniemi et al. 2024) leaves the rows outside of it to one conditional call; two scales
(InstructPix2Pix, Brooks et al. 2023) stack three calls. Keywords that cannot be stacked make a call of each output.
"""

from __future__ import annotations

import warnings
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import as_float, is_real, shown
from fastdiff.plan.plan import COLUMNS, Plan, guidance_weights
from fastdiff.sampling.keywords import ABSENT, APART, rebuilt
from fastdiff.sampling.start import first_rows
from fastdiff.schedules.level import Level

W0, P, Q = (COLUMNS.index(name) for name in ("w0", "p", "q"))

Scale = float | Sequence[float] | Sequence[Sequence[float]] | Callable[[Level], Any]


@dataclass(frozen=True)
class Guidance:
    """Which network calls a row makes, with which keywords, and the weights of their outputs.

    Attributes:
        outputs: how many outputs a guided row mixes; 1 where no row is guided.
        plain: the keywords of a row's one call, where it is not guided.
        calls: the keywords of a guided row's calls: of one over the stacked batch, or of one for each output.
        stacked: how many times the batch is stacked for a guided row's call.
        weights: of the outputs, the same in every row, or one tuple a row (``Plan.table``).
        rescale: φ of guidance rescale.
        scales: the scale, or pair of scales, of each network call; empty where there is nothing to guide with.
    """

    outputs: int = 1
    plain: Mapping[str, Any] = field(default_factory=dict)
    calls: tuple[Mapping[str, Any], ...] = ()
    stacked: int = 1
    weights: tuple[Any, ...] = ()
    rescale: float = 0.0
    scales: tuple[Any, ...] = ()

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
def row_outputs(plan: Plan, outputs: int, weights: tuple[Any, ...]) -> tuple[int, ...]:
    """How many of a guidance's outputs each row mixes: 0 where it makes no call, 1 where it is not guided."""
    by_row = weights if weights and isinstance(weights[0], tuple) else (weights,) * len(plan)
    of_call = [outputs if any(w[:-1]) else 1 for w in by_row]
    return tuple(count if row.calls_model else 0 for row, count in zip(plan, of_call, strict=True))


def mixed(outputs: Sequence[Tensor], row: Tensor) -> Tensor:
    """The guided output [B, n], float32, of a row of the device's table."""
    wide = [output.reshape(len(output), -1).to(torch.float32) for output in outputs]
    if len(wide) == 1:
        return wide[0]
    m = wide[0] * row[W0]
    for k, output in enumerate(wide[1:], start=1):
        m = m + output * row[W0 + k]
    return m


# ---- of sample's arguments


def resolve_guidance(
    plan: Plan,
    steps: int | None,
    batch: int,
    model_kwargs: Mapping[str, Any] | None,
    uncond_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    scale: Scale,
    rescale: float,
    interval: Sequence[float] | None = None,
) -> Guidance:
    """The guidance of ``sample``'s arguments, ``steps`` among them, under a plan."""
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"model_kwargs must be a mapping; got {type(model_kwargs).__name__}")
    for name in model_kwargs or ():
        if not isinstance(name, str):
            raise TypeError(f"model_kwargs' names must be str; got {name!r}")
    if not is_real(rescale) or not 0 <= rescale <= 1:
        got = shown(rescale) if isinstance(rescale, int) else repr(rescale)
        raise ValueError(f"guidance_rescale must be a number in [0, 1]; got {got}")
    plain = Guidance(plain=dict(model_kwargs or {}))
    if uncond_kwargs is interval is None and type(scale) is float and scale == 1 and rescale == 0:
        return plain
    single = uncond_kwargs is None or isinstance(uncond_kwargs, Mapping)
    values = _scales(scale, plan, steps, single)
    weights = _weights(values, plan)
    limits = None if interval is None else _interval(interval)
    if uncond_kwargs is None:
        if limits is not None:
            raise ValueError("guidance_interval needs uncond_kwargs, the unconditional call's keywords")
        if any(any(w[:-1]) for w in weights):
            warnings.warn(
                f"guidance_scale={scale} has no effect without uncond_kwargs: the network is called once",
                stacklevel=4,  # where sample was called
            )
        if rescale:
            raise ValueError(f"guidance_rescale={rescale} needs uncond_kwargs, the unconditional call's keywords")
        return plain
    outputs = len(weights[0])
    several = _several(uncond_kwargs, outputs - 1)
    names = [*several, "model_kwargs"]
    given, stacked = _together(names, [*several.values(), plain.plain], batch)
    scales = tuple(
        w[-1] if outputs == 2 else tuple(map(float, value))
        for row, w, value in zip(plan, weights, values, strict=True)
        if row.calls_model
    )
    conditional = (*(0.0 for _ in weights[0][1:]), 1.0)
    guided = [
        w if row.calls_model and row.is_guided(limits) else conditional for row, w in zip(plan, weights, strict=True)
    ]
    used = [any(column) for column in zip(*guided, strict=True)]  # an output that counts for nothing is not computed
    if sum(used) == 1 and used[-1]:
        return replace(plain, scales=scales)
    used[-1] = True
    rows = tuple(tuple(w for w, counts in zip(row, used, strict=True) if counts) for row in guided)
    if not all(used):
        several = {name: kwargs for (name, kwargs), counts in zip(several.items(), used[:-1], strict=True) if counts}
        names = [*several, "model_kwargs"]
        given, stacked = _together(names, [*several.values(), plain.plain], batch)
    outputs, apart = len(names), stacked is APART
    return Guidance(
        outputs, plain.plain, tuple(given) if apart else (stacked,), 1 if apart else outputs,
        rows[0] if len(set(rows)) == 1 else rows, float(rescale), scales,
    )  # fmt: skip


def _scales(scale: Any, plan: Plan, steps: int | None, single: bool) -> list[Any]:
    """The scale or pair of each row, None where it makes no call. ``single``: there are not two unconditional calls, so
    two scales are no pair where the plan has two calls.
    """
    if isinstance(scale, (np.ndarray, np.generic, Tensor)):  # of numbers or one number
        scale = scale.tolist()
    if callable(scale):
        of_level = [Level(row.t, row.alpha, row.sigma, row.c_in) if row.calls_model else None for row in plan]
        return [None if level is None else scale(level) for level in of_level]
    if isinstance(scale, Sequence) and not isinstance(scale, str) and _one_a_row(scale, plan, steps, single):
        return _by_row(scale, plan, steps)
    return [scale] * len(plan)


def _weights(scales: list[Any], plan: Plan) -> list[tuple[float, ...]]:
    """The outputs' weights in each row."""
    weights = [
        guidance_weights(scale) if row.calls_model or scale is not None else None
        for scale, row in zip(scales, plan, strict=True)
    ]
    counts = {len(w) for w in weights if w is not None}
    if len(counts) > 1:
        raise ValueError("guidance_scale must be numbers alone, or pairs alone, in every row")
    unused = (*(0.0 for _ in range(max(counts, default=2) - 1)), 1.0)  # in rows without a network call
    return [unused if w is None else w for w in weights]


def _one_a_row(scale: Sequence[Any], plan: Plan, steps: int | None, single: bool) -> bool:
    """Whether scales are one a row, rather than the pair of two unconditional calls."""
    if len(scale) == 1 and isinstance(scale[0], Real):
        return False  # one scale
    if len(scale) != 2 or any(isinstance(value, Sequence) and not isinstance(value, str) for value in scale):
        return True
    return single and 2 in (sum(row.calls_model for row in plan), steps)


def _by_row(scale: Sequence[Any], plan: Plan, steps: int | None) -> list[Any]:
    """The scale of each row, None where it makes no call; of scales one a call, or one a step of several calls."""
    calls = [i for i, row in enumerate(plan) if row.calls_model]
    first = first_rows(plan)
    by_row: list[Any] = [None] * len(plan)
    if len(scale) == len(calls):
        owner = range(len(calls))
    elif len(scale) == steps == len(first):
        owner = [bisect(first, i) - 1 for i in calls]  # type: ignore[assignment]
    else:
        a_step = f", or {steps}, one a step" if steps is not None and len(first) == steps != len(calls) else ""
        raise ValueError(
            f"guidance_scale has {len(scale)} entries; it must be a number, a pair, a function of the level, or hold "
            f"{len(calls)} of them, one a network call{a_step}"
        )
    for i, k in zip(calls, owner, strict=True):
        by_row[i] = scale[k]
    return by_row


def _interval(interval: Sequence[float]) -> tuple[float, float]:
    if isinstance(interval, (np.ndarray, Tensor)):
        interval = interval.tolist()
    if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
        raise TypeError(f"guidance_interval must be a pair (low, high) of σ/α; got {interval!r}")
    if any(isinstance(v, bool) or not isinstance(v, Real) for v in interval):
        raise TypeError(f"guidance_interval must hold two numbers; got {interval!r}")
    low, high = map(as_float, interval)
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


# ---- keywords of several calls as those of one


def _together(names: Sequence[str], values: Sequence[Any], batch: int) -> tuple[list[Any], Any]:
    """(what each call is given, what one call over the stacked batch is given or APART); the conditional one is last.

    Mappings, lists and tuples are merged entry by entry; what an unconditional mapping lacks is as the conditional one
    has it. Raises ValueError that names the keyword where it cannot be right in any call.
    """
    cond = values[-1]
    values = [cond if value is ABSENT else value for value in values]
    if all(isinstance(value, Mapping) for value in values):
        for name, value in zip(names, values, strict=True):
            unknown = sorted(str(key) for key in value if key not in cond)
            if unknown:
                raise ValueError(f"{name} has {', '.join(unknown)}, which {names[-1]} lacks")
        entries = [
            _together([f"{name}[{key!r}]" for name in names], [value.get(key, ABSENT) for value in values], batch)
            for key in cond
        ]
        return _collected(cond, entries, len(values))
    if all(isinstance(value, (list, tuple)) and len(value) == len(cond) for value in values):
        entries = [
            _together([f"{name}[{i}]" for name in names], [value[i] for value in values], batch)
            for i in range(len(cond))
        ]
        return _collected(cond, entries, len(values))
    if all(isinstance(value, Tensor) and value.ndim for value in values) and any(len(v) == batch for v in values):
        return _tensors(names, values, batch)
    return values, cond if all(_same(value, cond) for value in values[:-1]) else APART


def _collected(like: Any, entries: Sequence[tuple[list[Any], Any]], calls: int) -> tuple[list[Any], Any]:
    """A container of merged entries, for each call and for the stacked one."""
    each = [rebuilt(like, [given[k] for given, _ in entries]) for k in range(calls)]
    stacked = [value for _, value in entries]
    return each, APART if any(value is APART for value in stacked) else rebuilt(like, stacked)


def _tensors(names: Sequence[str], values: Sequence[Tensor], batch: int) -> tuple[list[Tensor], Any]:
    """Tensors of an entry a sample, or of one entry for all samples."""
    cond = values[-1]
    for name, value in zip(names, values, strict=True):
        like = (value.dtype, value.device, value.ndim) == (cond.dtype, cond.device, cond.ndim)
        if not like or len(value) not in (1, batch):
            raise ValueError(
                f"{name} must match {names[-1]}, {cond.dtype} {list(cond.shape)} on {cond.device}, and have {batch} "
                f"entries or 1; got {value.dtype} {list(value.shape)} on {value.device}"
            )
    wide = [value if len(value) == batch else value.expand(batch, *value.shape[1:]) for value in values]
    if any(value.shape != wide[-1].shape for value in wide):
        return wide, APART  # prompts of different lengths, say
    return wide, torch.cat(wide)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        like = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return like and torch.equal(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return False
    with suppress(Exception):  # of a comparison that has no one answer, an array's for one
        return bool(a == b)
    return False
