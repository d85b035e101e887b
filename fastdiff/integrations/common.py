"""What the adapters share: a run that starts from a given state, with torch's own noise unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import DTYPES, check_device, check_shape
from fastdiff.noise import INITIAL
from fastdiff.ops.backend import choose
from fastdiff.plan.plan import Plan
from fastdiff.sampling.noise_source import NoiseFunction, resolve_noise_source

SOURCES = ("seed", "seeds", "sample_offset", "generator", "noise_fn")


def initial(
    shape: Any, device: torch.device | str, options: Mapping[str, Any], draw: Callable[[], Tensor] | None = None
) -> Tensor:
    """z of x_T: from ``draw``, by default torch.randn, unless the options of ``fastdiff.sample`` name a source."""
    shape, device = check_shape("shape", shape), check_device(device)
    if not has_source(options):
        return torch.randn(shape, device=device) if draw is None else draw()
    draws = resolve_noise_source(shape, device, torch.float32, *(options.get(name) for name in SOURCES))
    return draws.noise(INITIAL, 0, choose(options.get("backend", "auto"), device.type))


def run_from(
    x: Tensor, shape: Any, options: Mapping[str, Any], noise_fn: NoiseFunction | None = None
) -> dict[str, Any]:
    """The arguments of ``fastdiff.sample`` for a run of this shape whose first state is x.

    Its noise comes from ``noise_fn``, by default torch.randn with the global generator, as in the libraries that are
    adapted, unless the options name another source.
    """
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"the first state must be a float32, bfloat16 or float16 tensor; got {getattr(x, 'dtype', x)}")
    if x.shape != check_shape("shape", shape):
        raise ValueError(f"the first state must have shape {list(shape)}; got {list(x.shape)}")

    def randn(stream: int, draw: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=x.dtype, device=x.device)

    if "resume" in options:
        raise TypeError("resume cannot be given: the run begins at the library's own first state")
    given = dict(x_T=x, device=x.device, model_dtype=x.dtype, **options)  # a name given twice is a TypeError
    if not has_source(options):
        given["noise_fn"] = randn if noise_fn is None else noise_fn
    return given


def has_source(options: Mapping[str, Any]) -> bool:
    """Whether the options name a source of noise."""
    return any(options.get(name) is not None for name in SOURCES)


def steps_of(plan: Plan) -> list[int]:
    """The step that each row belongs to: it begins with churn, or else with a call that reads no anchor."""
    steps: list[int] = []
    for k, row in enumerate(plan):
        begins = k == 0 or (plan[k - 1].calls_model and not row.uses("anchor"))
        steps.append((steps[-1] if steps else -1) + begins)
    return steps
