"""Where a run begins: noise, a given state, a noised image (image-to-image), an earlier run; inpainting's images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.checks import all_finite, check_finite, check_int, check_number, kind_of
from fastdiff.noise import INITIAL
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import SLOTS
from fastdiff.sampling.noise_source import NoiseSource
from fastdiff.sampling.state import State, check_belongs


def by_strength(
    plan: Plan, strength: float, steps: int | None, rebuilt: Callable[[int], Plan] | None
) -> tuple[Plan, int]:
    """(plan, its first row) of image-to-image: the last int(steps·strength) steps, as diffusers counts them.

    A step is a row, or the rows of one level in samplers that call the network twice for it. A sampler with a history
    cannot begin in the middle of one: ``rebuilt(skip)`` is its plan over the levels that are left.
    """
    check_number("strength", strength, 0, 1)
    count = len(plan) if steps is None else steps
    skip = count - min(int(count * float(strength)), count)
    if skip == 0:
        return plan, 0
    if skip == count:
        return plan, len(plan)
    begins = first_rows(plan)
    if len(begins) == count:
        return plan, begins[skip]
    if rebuilt is None or steps is None:
        raise ValueError(
            f"strength cannot tell the steps of the plan {plan.name!r} apart; give the sampler's name and steps, "
            "or start_step"
        )
    return rebuilt(skip), 0


def first_rows(plan: Plan) -> list[int]:
    """The first row of each step, where the plan's rows can be told apart so: no row of a step with a history begins
    one. A row after one without a network call belongs to the same step: EDM's churn comes before its step.
    """
    return [i for i in plan.entries if i == 0 or plan[i - 1].calls_model]


def initial_state(
    plan: Plan,
    shape: tuple[int, ...],
    device: torch.device,
    draws: NoiseSource,
    x_T: Tensor | None,
    x_init: Tensor | None,
    start: int,
    resume: State | None,
    backend: str,
) -> tuple[int, Tensor]:
    """The first row, and the state before it; the run writes to it, and the caller's tensors stay the caller's."""
    if resume is not None:
        x = _copied("resume.x", resume.x, shape, device)
        check_belongs(resume, plan, draws.identity)
        return check_int("resume.row", resume.row, 0, len(plan)), x
    if x_T is not None:
        return start, _copied("x_T", x_T, shape, device)
    clean = None if x_init is None else _copied("x_init", x_init, shape, device)
    if clean is not None and start == len(plan):
        return start, clean
    z = draws.noise(INITIAL, 0, backend)
    if draws.draw is not None and not all_finite(z):
        raise FloatingPointError(f"noise_fn({INITIAL}, 0, shape) returned NaN or infinity")
    if clean is not None:
        return start, clean * plan[start].alpha + z * plan[start].sigma
    return 0, z if plan.init_sigma == 1 and draws.draw is None else z * plan.init_sigma


def check_start(
    plan: Plan,
    x_T: Tensor | None,
    x_init: Tensor | None,
    start_step: int,
    strength: float | None,
    resume: State | None,
) -> None:
    """That the arguments which say where to begin go together."""
    check_int("start_step", start_step, 0, len(plan.rows) - 1)
    if resume is not None:
        if x_T is not None or x_init is not None or start_step != 0:
            raise ValueError("resume goes without x_T, x_init and start_step; strength is that of the first run")
        if not isinstance(resume, State):
            raise TypeError(f"resume must be a State; got {type(resume).__name__}")
        if not isinstance(resume.slots, tuple) or len(resume.slots) != SLOTS:
            raise ValueError(f"resume.slots must have {SLOTS} entries, tensors or None; got {resume.slots!r:.80}")
        return
    if x_T is not None and (x_init is not None or strength is not None):
        raise ValueError("x_T is the first state itself; it goes without x_init and strength, which would noise one")
    if strength is not None and start_step != 0:
        raise ValueError("strength says where to start; it goes without start_step")
    if x_T is None and x_init is None and (start_step != 0 or strength is not None):
        given = "strength" if strength is not None else f"start_step={start_step}"
        raise ValueError(f"{given} needs x_init, the images to start from, or x_T, the state there")
    if start_step != 0 and start_step not in plan.entries:
        raise ValueError(
            f"start_step is {start_step}, but from that row on the plan {plan.name!r} reads a history that only "
            "earlier rows write; leave the first levels out of the plan instead (skip=, or strength=)"
        )


def resolve_mask(
    mask: Tensor | None, known: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inpainting's mask and known image as float32 [B, …], copies of the caller's."""
    if mask is None or known is None:
        raise ValueError("mask and known go together: give both or neither")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor; got {kind_of(mask)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool or floating-point; got {mask.dtype}")
    if mask.layout != torch.strided:
        raise TypeError(f"mask must be a dense tensor; got a {mask.layout} one")
    if mask.device != device:
        raise ValueError(f"mask must be on the model's device {device}; got {mask.device}")
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > len(shape) or any(own not in (1, size) for own, size in sizes):
        raise ValueError(f"mask must broadcast to {list(shape)}; got {list(mask.shape)}")
    wide = mask.detach().to(torch.float32)
    if not bool(((wide >= 0) & (wide <= 1)).all()):
        raise ValueError("mask must lie in [0, 1], 1 where the image is known")
    image = _copied("known", known, shape, device)
    return wide.expand(shape).clone(memory_format=torch.contiguous_format), image


def _copied(name: str, image: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A finite float32 copy of a checked tensor of the run's shape, contiguous."""
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a tensor; got {kind_of(image)}")
    if not image.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {image.dtype}")
    if image.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got a {image.layout} one")
    if tuple(image.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(image.shape)}")
    if image.device != device:
        raise ValueError(f"{name} must be on the model's device {device}; got {image.device}")
    copy = image.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not all_finite(copy):
        check_finite(name, image)
        raise ValueError(f"{name} must hold numbers that float32 has; got some of {float(image.abs().max()):g}")
    return copy
