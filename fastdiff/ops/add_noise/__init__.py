"""The noising step x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (Ho et al. 2020, Equation 4), ε drawn in the same pass or given.

reference.py says what is computed; csrc/{cpu/add_noise.cpp, cuda/add_noise.cu} and triton_impl.py give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastdiff.checks import check_dense, check_int, check_shape
from fastdiff.noise import TRAINING, NoiseKey, noise_key
from fastdiff.ops.backend import choose
from fastdiff.ops.registry import LIBRARY, register, traced, transformed
from fastdiff.ops.view import viewable
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.resolve import resolve_table


def add_noise(
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule | str,
    *,
    noise: Tensor | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    draw: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Noise clean images to timestep t: x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε.

    Args:
        x0: [B, …] of float32, bfloat16 or float16, of any strides; gradients flow to it.
        t: an index 0 ≤ t < T, or an int64 tensor [B] of them. Indices on a GPU are not read back: one out of range
            makes its sample NaN. On the CPU it is a ValueError.
        schedule: a NoiseSchedule, or a name (see fastdiff.NoiseSchedule).
        noise: ε, of x0's shape, dtype and device; or None to draw the normals of (seed, sample, draw, stream 2).
        seed, seeds, sample_offset: as for ``fastdiff.randn``.
        draw: which noise of the sample: in training, the step's number.

    Returns:
        (x_t, ε), both of x0's shape, dtype and memory format. The arithmetic is float32.
    """
    check_dense("x0", x0)
    if x0.ndim == 0:
        raise ValueError("x0 must have a batch dimension first; got a tensor without dimensions")
    check_shape("x0.shape", x0.shape)
    schedule = resolve_table(schedule)
    t = _check_timesteps(t, len(x0), x0.device, len(schedule))
    draw = check_int("draw", draw, 0, (1 << 32) - 1)
    if noise is not None:
        if not isinstance(noise, Tensor):
            raise TypeError(f"noise must be a tensor; got {type(noise).__name__}")
        if noise.layout != torch.strided:
            raise TypeError(f"noise must be a dense tensor; got {noise.layout}")
        if noise.shape != x0.shape or noise.dtype != x0.dtype or noise.device != x0.device:
            raise ValueError(
                f"noise must have x0's shape {list(x0.shape)}, dtype {x0.dtype} and device {x0.device}; "
                f"got {list(noise.shape)}, {noise.dtype}, {noise.device}"
            )
        if seeds is not None or any((type(n) is not int or n) for n in (seed, sample_offset, draw)):
            raise ValueError("noise was given, so seed, seeds, sample_offset and draw must be left out")
    key = noise_key(len(x0), x0.device, seed, seeds, sample_offset)
    plain = transformed()
    backend = "reference" if plain else choose(backend, x0.device.type)
    coefficients = _coefficients(schedule, x0.device)
    needs_grad = torch.is_grad_enabled() and (x0.requires_grad or (noise is not None and noise.requires_grad))
    if not plain and (needs_grad or traced(x0, t, noise)):
        if not isinstance(t, Tensor):
            t = torch.full((len(x0),), t, dtype=torch.int64, device=x0.device)
        x_t, drawn = torch.ops.fastdiff.add_noise(
            x0, t, coefficients, noise, *key.tensors(len(x0), x0.device), draw, backend
        )
    else:
        x_t, drawn = _compute(x0, t, coefficients, noise, key, draw, backend)
    return x_t, drawn if noise is None else noise


def _check_timesteps(t: int | Tensor, batch: int, device: torch.device, T: int) -> int | Tensor:
    if not isinstance(t, Tensor):
        return check_int("t", t, 0, T - 1)
    if t.dtype != torch.int64:
        raise TypeError(f"t must be int64; got {t.dtype}")
    if t.shape != (batch,):
        raise ValueError(f"t must be an int or have shape [{batch}], one index a sample; got {list(t.shape)}")
    if t.device != device:
        raise ValueError(f"t must be on x0's device {device}; got {t.device}")
    if device.type == "cpu" and batch and not traced(t) and not transformed():
        numbers = t.tolist()
        low, high = min(numbers), max(numbers)
        if low < 0 or high >= T:
            raise ValueError(f"t must be in [0, {T - 1}]; got {low if low < 0 else high}")
    return t


def _coefficients(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        with _disable_current_modes():  # a table of fake tensors must not be kept for later calls
            return _table(schedule, device)
    if transformed():  # where NumPy cannot read a tensor, though the schedule is none of the transform's
        with torch._C._DisableFuncTorch():
            return _table(schedule, device)
    return _table(schedule, device)


@lru_cache(maxsize=32)
def _table(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    return torch.stack([schedule.alphas, schedule.sigmas], dim=1).to(torch.float32).to(device)


def _compute(
    x0: Tensor, t: int | Tensor, coefficients: Tensor, noise: Tensor | None, key: NoiseKey, draw: int, backend: str
) -> tuple[Tensor, Tensor]:
    """(x_t, the drawn noise; an empty tensor where noise was given)."""
    x_t = torch.empty_like(x0)
    drawn = torch.empty_like(x0) if noise is None else x0.new_empty(0)
    if backend == "reference":
        from fastdiff.ops.add_noise.reference import add_noise as reference
        from fastdiff.ops.randn.reference import randn

        indices = t if isinstance(t, Tensor) else torch.full((len(x0),), t, dtype=torch.int64, device=x0.device)
        if noise is None:
            z = randn(tuple(x0.shape), *key.lists(len(x0)), draw, TRAINING, x0.device)
            drawn.copy_(z)
        else:
            z = noise.to(torch.float32)
        return x_t.copy_(reference(x0, z, indices, coefficients)), drawn
    if backend == "native":
        from fastdiff.ops.add_noise import native_impl as impl
    else:
        from fastdiff.ops.add_noise import triton_impl as impl  # type: ignore[no-redef]
    given = None if noise is None else viewable(noise)
    times = t.contiguous() if isinstance(t, Tensor) else t
    # A memory format that no kernel can walk is computed contiguous and copied.
    x_t_view = viewable(x_t)
    drawn_view = viewable(drawn) if noise is None else None
    impl.add_noise(x_t_view, drawn_view, viewable(x0), given, times, coefficients, key, draw, TRAINING)
    if x_t_view is not x_t:
        x_t.copy_(x_t_view)
        if drawn_view is not None:
            drawn.copy_(drawn_view)
    return x_t, drawn


def _run(
    x0: Tensor, t: Tensor, coefficients: Tensor, noise: Tensor | None, seeds: Tensor, samples: Tensor, draw: int,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    key = NoiseKey(seeds=seeds.contiguous(), samples=samples.contiguous())
    return _compute(x0, t, coefficients, noise, key, draw, backend)


def _fake(
    x0: Tensor, t: Tensor, coefficients: Tensor, noise: Tensor | None, seeds: Tensor, samples: Tensor, draw: int,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x0), torch.empty_like(x0) if noise is None else x0.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.noise_given = inputs[3] is not None
    if not ctx.noise_given:
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, grad_drawn: Tensor | None) -> tuple[Tensor | None, ...]:
    # x_t is linear in x_0 and in a given ε.
    t, coefficients = ctx.saved_tensors
    alpha, sigma = (coefficients[t, k].view(-1, *[1] * (grad.ndim - 1)) for k in range(2))
    wide = grad.to(torch.float32)
    grad_noise = (wide * sigma).to(grad.dtype) if ctx.noise_given else None
    return (wide * alpha).to(grad.dtype), None, None, grad_noise, None, None, None, None


register(
    "add_noise(Tensor x0, Tensor t, Tensor coefficients, Tensor? noise, Tensor seeds, Tensor samples, int draw, "
    "str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)
torch.library.register_autograd("fastdiff::add_noise", _backward, setup_context=_save, lib=LIBRARY)
