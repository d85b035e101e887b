"""The reverse update: one row of a plan applied to the state in one pass over memory.

fastdiff/plan/row.py has the formula, reference.py computes it in plain PyTorch; csrc/{common/row.h, cpu/update.cpp,
cuda/update.cu} and triton_impl.py compute the same bits. The sampling loop holds one ``bind`` for a whole run; the
function ``update`` is its functional form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff.checks import DTYPES, check_dtype, check_int
from fastdiff.noise import NoiseKey, noise_key
from fastdiff.ops.backend import choose
from fastdiff.ops.registry import LIBRARY, register, traced, transformed
from fastdiff.ops.update.checks import (
    check_given,
    check_guidance,
    check_sequence,
    check_state,
    check_table,
    split_outputs,
)
from fastdiff.ops.update.operands import Operands
from fastdiff.plan.plan import COLUMNS, SLOTS, Plan, rounded


class Updated(NamedTuple):
    """What a row wrote; None where it does not write, or was not asked to."""

    x: Tensor
    anchor: Tensor | None
    slot: Tensor | None
    x0: Tensor | None
    model_input: Tensor | None


class BoundUpdate(Protocol):
    """An update whose tensors are set: called with a row's number, or an int64 tensor [1] that holds it."""

    operands: Operands

    def set_state(self, x: Tensor, x_out: Tensor) -> None: ...
    def set_outputs(self, outputs: tuple[Tensor, ...], variance: Tensor | None = None) -> None: ...
    def set_noise(self, noise: Tensor | None, known_noise: Tensor | None = None) -> None: ...
    def set_results(self, x0_out: Tensor | None, anchor_out: Tensor | None) -> None: ...
    def __call__(self, row: int | Tensor) -> None: ...


def bind(operands: Operands, backend: str) -> BoundUpdate:
    """An update on checked tensors through one named backend."""
    return _implementation(backend)(operands)


@lru_cache(maxsize=3)
def _implementation(backend: str) -> Callable[[Operands], BoundUpdate]:
    if backend == "native":
        from fastdiff.ops.update.native_impl import Update
    elif backend == "triton":
        from fastdiff.ops.update.triton_impl import Update  # type: ignore[assignment]
    else:
        from fastdiff.ops.update.reference import Update  # type: ignore[assignment]
    return Update


def update(
    x: Tensor,
    outputs: Tensor | Sequence[Tensor],
    plan: Plan,
    row: int,
    *,
    guidance: Sequence[float] = (),
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    sample_offset: int = 0,
    anchor: Tensor | None = None,
    slots: Sequence[Tensor | None] = (None,) * SLOTS,
    noise: Tensor | None = None,
    gain: Tensor | None = None,
    clip: Tensor | None = None,
    gradient: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
    table: Tensor | None = None,
    return_x0: bool = False,
    model_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    backend: str = "auto",
) -> Updated:
    """Apply row ``row`` of ``plan`` to the state x (the formula stands in fastdiff.plan).

    Args:
        x: the state, contiguous float32 [B, …]; or float64, which the reference computes in float64 throughout.
        outputs: the network's output, or two or three of them to be guided; float32, bfloat16 or float16 of x's shape
            and any strides. Under the plan's learned variance the last one has twice x's channels. Empty where the
            row makes no network call.
        guidance: the weights of several outputs (``plan.guidance_weights``).
        seed, seeds, sample_offset: who draws the noise, as for ``fastdiff.randn``; its stream and draw are the row's.
        anchor, slots, gradient: what the row reads, like x. noise: z, in place of drawing it, like x.
        gain: float32 [B], a factor of the guided output. clip: float32 [B, 2], bound and scale in place of the row's.
        mask, known: like x; x' ← mask·(known image at the next row's level) + (1 − mask)·x'. known_noise: its z.
        table: float64 [rows, 48] on the CPU: the numbers of the plan's rows (``Plan.table``) in place of its own, the
            weights of guidance among them, for a caller who learns them. Which terms are slots, what a row writes and
            whether it calls the network are the plan's.
        return_x0: also return x̂_0. model_dtype: also return the network's next input, in this dtype and
        channels_last: in this memory format.

    Returns:
        ``Updated``; its tensors are new. Differentiable, through the reference, when called eagerly: by every tensor
        that is read, ``table`` among them.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it should be.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan; got {type(plan).__name__}")
    row = check_int("row", row, 0, len(plan.rows) - 1)
    r = plan.rows[row]
    check_state(x)
    shape, device = x.shape, x.device
    several = (outputs,) if isinstance(outputs, Tensor) else check_sequence("outputs", outputs)
    slots, guidance = check_sequence("slots", slots), check_sequence("guidance", guidance)
    named = (anchor, noise, gradient, mask, known, known_noise, gain, clip, *slots)
    given = {name: t for name, t in zip(_NAMES, named, strict=False) if t is not None}
    check_given(x, r, row, given, len(slots))
    weights = check_guidance(guidance, len(several))
    numbers = plan.table(weights) if table is None else check_table(table, plan)
    several, variance = split_outputs(several, shape, plan.learned_variance, device, "outputs", x.dtype)
    variance = variance if plan.reads_variance else None
    if r.calls_model != (len(several) > 0):  # older compilers cannot trace bool(tuple)
        raise ValueError(f"row {row} makes {'a' if r.calls_model else 'no'} network call; got {len(several)} outputs")
    if model_dtype is not None:
        check_dtype("model_dtype", model_dtype)
    for name, flag in (("return_x0", return_x0), ("channels_last", channels_last)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool; got {type(flag).__name__}")
    if channels_last and x.ndim != 4:
        raise ValueError(f"channels_last needs x of four dimensions; got {x.ndim}")

    key = noise_key(shape[0], device, seed, seeds, sample_offset)
    wants = WANTS_X0 * return_x0 + WANTS_CHANNELS_LAST * channels_last
    wants += WANTS_ANCHOR * (r.anchor is not None) + WANTS_SLOT * (r.write is not None)
    if model_dtype is not None:
        wants += WANTS_INPUT + (DTYPES.index(model_dtype) << 8)
    tensors = (x, *several, *given.values(), numbers)
    needs_grad = transformed() or (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))
    if needs_grad or x.dtype == torch.float64:
        if backend not in ("auto", "reference"):
            why = "float64" if x.dtype == torch.float64 else "autograd"
            raise ValueError(f"backend={backend!r} has no {why}; take backend='auto' or 'reference'")
        backend = "reference"
    backend = choose(backend, device.type)
    run: Callable[..., list[Tensor]] = _compute
    who: tuple[Any, ...] = (key,)
    if traced(*tensors) and not needs_grad:
        if not torch.compiler.is_compiling() and torch._C._is_tracing():
            raise RuntimeError("update cannot be recorded by torch.jit.trace, which knows no lists of optional tensors")
        run, who = torch.ops.fastdiff.update, key.tensors(shape[0], device)
    written = run(
        x, list(several), variance, numbers, row, wants, *who, anchor, list(slots), noise, gain, clip,
        gradient, mask, known, known_noise, backend,
    )  # fmt: skip
    if len(written) == 1:
        return Updated(written[0], None, None, None, None)
    rest = iter(written)
    return Updated(
        next(rest),
        *(next(rest) if wants & bit else None for bit in (WANTS_ANCHOR, WANTS_SLOT, WANTS_X0, WANTS_INPUT)),
    )


_NAMES = ("anchor", "noise", "gradient", "mask", "known", "known_noise", "gain", "clip",
          *(f"slots[{i}]" for i in range(SLOTS)))  # fmt: skip
WANTS_ANCHOR, WANTS_SLOT, WANTS_X0, WANTS_INPUT, WANTS_CHANNELS_LAST = 1, 2, 4, 8, 16  # then the input's dtype << 8


# ---- the operator


@lru_cache(maxsize=64)
def _device_table(table: Tensor, device: torch.device) -> Tensor:
    return rounded(table).to(device)


def _compute(
    x: Tensor, outputs: list[Tensor], variance: Tensor | None, table: Tensor, row: int, wants: int, key: NoiseKey,
    anchor: Tensor | None, slots: list[Tensor | None], noise: Tensor | None, gain: Tensor | None, clip: Tensor | None,
    gradient: Tensor | None, mask: Tensor | None, known: Tensor | None, known_noise: Tensor | None, backend: str,
) -> list[Tensor]:  # fmt: skip
    if x.dtype == torch.float32 and not table.requires_grad:
        device_table = _device_table(table, x.device)
    if backend == "reference":
        from fastdiff.ops.update.reference import Inputs, drawn
        from fastdiff.ops.update.reference import update as reference

        z, known_z = drawn(table[row], x, key, noise, known_noise, mask)
        inputs = Inputs(
            x, tuple(outputs), variance, anchor, tuple(slots), z, gain, clip, gradient, mask, known, known_z
        )
        out = reference(table[row], inputs)
        optional = zip((out.anchor, out.slot, out.x0), (WANTS_ANCHOR, WANTS_SLOT, WANTS_X0), strict=True)
        result = [out.x, *(t for t, bit in optional if t is not None and wants & bit)]
        if wants & WANTS_INPUT:
            result.append(_like(x, wants).copy_(out.model_input))
        return result
    result = _fake(x, outputs, variance, table, row, wants)
    rest = iter(result)
    operands = Operands(x, next(rest), device_table, key, tuple(outputs), variance, anchor)
    if wants & WANTS_ANCHOR:
        operands.anchor_out = next(rest)
    if wants & WANTS_SLOT:
        operands.slots_out[int(table[row, COLUMNS.index("write")])] = next(rest)
    if wants & WANTS_X0:
        operands.x0_out = next(rest)
    if wants & WANTS_INPUT:
        operands.model_input = next(rest)
    operands.slots = list(slots)
    operands.noise, operands.known_noise = noise, known_noise
    operands.gain, operands.clip, operands.gradient, operands.mask, operands.known = gain, clip, gradient, mask, known
    bind(operands, backend)(row)
    return result


def _run(
    x: Tensor, outputs: list[Tensor], variance: Tensor | None, table: Tensor, row: int, wants: int, seeds: Tensor,
    samples: Tensor, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    key = NoiseKey(seeds=seeds.contiguous(), samples=samples.contiguous())
    return _compute(x, outputs, variance, table, row, wants, key, *rest)


def _like(x: Tensor, wants: int) -> Tensor:
    layout = torch.channels_last if wants & WANTS_CHANNELS_LAST else torch.contiguous_format
    return torch.empty(x.shape, dtype=DTYPES[wants >> 8], device=x.device, memory_format=layout)


def _fake(
    x: Tensor, outputs: list[Tensor], variance: Tensor | None, table: Tensor, row: int, wants: int, *_: object
) -> list[Tensor]:
    result = [torch.empty_like(x)]
    if wants:
        result += [torch.empty_like(x) for bit in (WANTS_ANCHOR, WANTS_SLOT, WANTS_X0) if wants & bit]
    return [*result, _like(x, wants)] if wants & WANTS_INPUT else result


def _no_backward(ctx: object, *grads: object) -> None:
    raise RuntimeError("fastdiff.ops.update is not differentiable under torch.compile; call it eagerly for gradients")


register(
    "update(Tensor x, Tensor[] outputs, Tensor? variance, Tensor table, int row, int wants, Tensor seeds, "
    "Tensor samples, Tensor? anchor, Tensor?[] slots, Tensor? noise, Tensor? gain, Tensor? clip, Tensor? gradient, "
    "Tensor? mask, Tensor? known, Tensor? known_noise, str backend) -> Tensor[]",
    _run,
    _fake,
)
torch.library.register_autograd("fastdiff::update", _no_backward, lib=LIBRARY)
