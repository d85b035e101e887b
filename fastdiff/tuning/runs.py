"""The runs that learning makes: some of the samples at a time, each with its own noise and conditions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.plan.plan import Plan
from fastdiff.sampling.keywords import mapped
from fastdiff.sampling.request import Request
from fastdiff.sampling.sample import bind, sample
from fastdiff.sampling.stepper import plain_tensors
from fastdiff.tuning.walk import outputs_at


@dataclass(frozen=True)
class Runs:
    """A network, and how it is sampled whatever the plan.

    Attributes:
        shape: [N, …] of all samples; number i's noise is that of (seed, i).
        batch: samples at a time.
        arguments: of ``sample`` beside the plan; tensors of N entries hold one a sample.
        features: in what distances are measured; None: in x.
    """

    model: Callable[..., Any]
    shape: tuple[int, ...]
    batch: int
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    features: Callable[[Tensor], Tensor] | None = None

    def of(self, plan: Plan, begin: int, count: int) -> dict[str, Any]:
        """The arguments of ``sample`` for some of the samples."""

        def cut(value: Any) -> Any:
            mine = isinstance(value, Tensor) and value.ndim and len(value) == self.shape[0]
            return value[begin : begin + count] if mine else value

        return {**mapped(dict(self.arguments), cut), "sampler": plan, "seed": self.seed, "sample_offset": begin}

    def request(self, plan: Plan, begin: int, count: int) -> Request:
        """The request of such a run."""
        bound = bind(self.model, (count, *self.shape[1:]), **self.of(plan, begin, count))
        bound.apply_defaults()
        with plain_tensors():
            return Request.of(*bound.args, **bound.kwargs)

    def parts(self, begin: int, end: int, times: int = 1) -> Iterator[tuple[int, int]]:
        """(first, count) of each batch of samples begin … end − 1, or of so many batches at once."""
        size = times * self.batch
        for first in range(begin, end, size):
            yield first, min(size, end - first)

    def ends(self, plan: Plan, begin: int, end: int) -> Tensor:
        """The last states of samples begin … end − 1, float32 on the CPU: without gradients four batches at once."""
        return torch.cat([
            sample(self.model, (count, *self.shape[1:]), **self.of(plan, first, count)).cpu()
            for first, count in self.parts(begin, end, 4)
        ])  # fmt: skip

    def squares(self, x: Tensor, other: Tensor) -> Tensor:
        """The mean square of the distance of each pair of samples [B], in x or in features."""
        if self.features is not None:
            x, other = (_features(self.features, part) for part in (x, other))
        return (x - other).square().flatten(1).mean(1) if x.ndim > 1 else (x - other).square()

    def distance(self, states: Tensor, others: Tensor, device: torch.device) -> float:
        """The root of the mean square over all samples."""
        with torch.no_grad():
            total = sum(
                float(self.squares(states[i : i + n].to(device), others[i : i + n].to(device)).double().sum())
                for i, n in self.parts(0, len(states))
            )
        return float((total / len(states)) ** 0.5)


def _features(features: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found = features(x)
    if not isinstance(found, Tensor) or found.ndim == 0 or len(found) != len(x) or not found.is_floating_point():
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"features must return a floating-point tensor [{len(x)}, …] for x {list(x.shape)}; got {got}")
    return found.float()


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """A network whose weights ask for no gradient for a while, so that none is computed of them."""
    asked = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Probed:
    """What a network was seen to do with a gradient, and with a float t."""

    differentiable: bool
    learns_t: bool


def probe(runs: Runs, plan: Plan) -> Probed:
    """Ask a network once, with one batch: does its output have a gradient by x; can t be any float, with a gradient?

    A t that a network takes as a float but rounds, or turns into an index, has none.
    """
    request = runs.request(plan, 0, min(2, runs.batch, runs.shape[0]))
    row = next(i for i, row in enumerate(plan) if row.calls_model)
    x = request.x.clone().requires_grad_(True)
    with torch.enable_grad():
        whole = _sum(outputs_at(request, x, torch.tensor(plan[row].t), row))
        if not whole.requires_grad or torch.autograd.grad(whole, x, allow_unused=True)[0] is None:
            return Probed(False, False)
        # Between two whole ones, so that a network that interpolates in a table shows a slope.
        t = torch.tensor(float(plan[row].t) - (0.25 if plan.integer_timesteps else 0.0), requires_grad=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                told = _sum(outputs_at(request, x, t, row, as_float=True))
        except Exception:  # whatever a network raises that looks up an index
            return Probed(True, False)
        slope = torch.autograd.grad(told, t, allow_unused=True)[0] if told.requires_grad else None
    return Probed(True, slope is not None and bool(slope.isfinite()) and bool(slope != 0))


def takes_floats(runs: Runs, plan: Plan) -> bool:
    """Whether a network can be called with a float t, asked once. One that looks up an index raises."""
    request = runs.request(plan, 0, min(2, runs.batch, runs.shape[0]))
    row = next(i for i, row in enumerate(plan) if row.calls_model)
    with torch.no_grad():
        try:
            outputs_at(request, request.x, torch.tensor(float(plan[row].t)), row, as_float=True)
        except (IndexError, TypeError, RuntimeError):
            return False
    return True


def _sum(outputs: tuple[Tensor, ...]) -> Tensor:
    total = sum((output.float().square().sum() for output in outputs), torch.zeros(()))
    assert isinstance(total, Tensor)
    return total
