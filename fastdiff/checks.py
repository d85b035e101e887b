"""What arguments must be: each check raises TypeError or ValueError that names the argument, what it is and what it
should be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from numbers import Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of networks, and of what the kernels read and write
LARGEST = torch.finfo(torch.float32).max

# ---- numbers


def check_finite_number(name: str, value: Any) -> float:
    """``value`` itself if it is a number (of numpy's kinds, too) that float64 holds; else TypeError or ValueError."""
    check_real(name, value)
    if not is_finite(value):
        raise ValueError(f"{name} must be finite; got {shown(value)}")
    return value


def is_real(value: Any) -> bool:
    """Whether a value is a number; numpy's kinds are, too."""
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def check_real(name: str, value: Any) -> None:
    """Raises TypeError for what is no number."""
    if not is_real(value):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def check_positive(name: str, value: Any) -> float:
    """``value`` itself if it is a finite number above 0; else TypeError or ValueError naming it."""
    if not check_finite_number(name, value) > 0:
        raise ValueError(f"{name} must be positive and finite; got {value}")
    return value


def is_finite(value: Any) -> bool:
    """Whether float64 holds a number: an int beyond it is not finite."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def as_float(value: Any) -> float:
    """A number as a float; an int beyond float64 is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def shown(value: Any) -> str:
    """A number in a message; an int of hundreds of digits is not written out."""
    return f"an int of {value.bit_length()} bits" if isinstance(value, int) and abs(value) >= 1 << 64 else str(value)


def kind_of(value: Any) -> str:
    """What something is that should have been a tensor, for a message; an array's says how to make one of it."""
    if isinstance(value, np.ndarray):
        return "a NumPy array; torch.from_numpy makes a tensor of it"
    return type(value).__name__


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that holds NaN or infinity. Waits for the device."""
    if not all_finite(tensor):
        raise ValueError(f"{name} must be finite; it holds NaN or infinity")


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. On a CPU by numpy: torch's threads hang in a forked child."""
    if tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        return bool(np.isfinite(tensor.detach().numpy()).all())
    return bool(tensor.isfinite().all())


# ---- ints, floats in a range, choices, shapes, devices


def check_int(name: str, value: object, low: int, high: int) -> int:
    """``value`` if it is an int in [low, high], else TypeError or ValueError naming it."""
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, (bool, Tensor, np.ndarray)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    number = value.__index__()
    if not low <= number <= high:
        raise ValueError(f"{name} must be in [{low}, {high}]; got {shown(number)}")
    return number


def check_number(name: str, value: float, low: float, high: float | None = None) -> float:
    """``value`` as a float in [low, high], or finite and at least low; else TypeError or ValueError naming it."""
    check_real(name, value)
    if high is None and not (is_finite(value) and low <= value):
        raise ValueError(f"{name} must be finite and at least {low:g}; got {shown(value)}")
    if high is not None and not (low <= value <= high and (value == math.inf or is_finite(value))):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}]; got {shown(value)}")
    return float(value)


def check_float32(name: str, value: float, low: float = -math.inf) -> float:
    """``value`` as a float that is at least low and finite in float32, in which it is used."""
    check_real(name, value)
    if not (low <= value and abs(value) <= LARGEST):  # written so that NaN fails
        where = " in float32" if is_finite(value) else ""
        least = "" if low == -math.inf else f" and at least {low:g}"
        raise ValueError(f"{name} must be finite{where}{least}; got {shown(value)}")
    return float(value)


def check_clip(clip: float | None) -> float:
    """The bound of |x̂_0| as a float, infinite for None."""
    if clip is None:
        return math.inf
    if not is_real(clip):
        raise TypeError(f"clip must be a number or None; got {type(clip).__name__}")
    if not clip > 0:
        raise ValueError(f"clip must be positive; got {clip}")
    return float(clip) if is_finite(clip) else math.inf  # an int beyond float64 bounds nothing


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {value!r}" + nearest(str(value), known))


def nearest(name: object, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the known one that is meant, or all of them."""
    close = get_close_matches(name, known, n=1) if isinstance(name, str) else []
    return f"; did you mean {close[0]!r}?" if close else f"; it must be one of {', '.join(known)}"


def check_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape [B, …] of non-negative ints with at most 2³⁴ elements a sample."""
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"{name} must be a sequence of ints; got {type(shape).__name__}")
    sizes = tuple(shape)
    # torch.jit.trace has tensors in the place of sizes; the compiler cannot trace the question.
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        sizes = tuple(int(size) for size in sizes)
    if not all([type(size) is int and size >= 0 for size in sizes]):  # a compiler's symbols are checked by their tensor
        sizes = tuple(check_int(f"{name}[{i}]", size, 0, (1 << 63) - 1) for i, size in enumerate(shape))
    if not sizes:
        raise ValueError(f"{name} must have a batch dimension first; got ()")
    n = 1
    for size in sizes[1:]:
        n *= size
    if n > 1 << 34:
        raise ValueError(f"{name} has {n} elements a sample; the noise stream has 2**34")
    return sizes


def check_device(device: torch.device | str | None) -> torch.device:
    """The device, by default torch's; ValueError for one that this machine lacks."""
    if device is None:
        return torch.empty(0).device  # torch.get_default_device() cannot be traced by torch.compile
    if not isinstance(device, (str, int, torch.device)) or isinstance(device, bool):
        raise TypeError(f"device must be a torch.device, its name or a number; got {type(device).__name__}")
    try:
        target = torch.device(device)
    except (RuntimeError, ValueError, OverflowError) as error:
        told = shown(device) if isinstance(device, int) else repr(device)
        raise ValueError(f"device is {told}: {error}") from error
    # torch wraps an index beyond 127 around to a negative one.
    if target.type == "cuda" and not 0 <= (target.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices here")
    if target.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=target)
        except (RuntimeError, AssertionError, ImportError) as error:  # by name and by build of torch
            raise ValueError(f"device is {str(target)!r}: {error}") from error
    return target


def named_device(name: str) -> torch.device:
    """``check_device``, and "auto": the GPU where there is one."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    return torch.empty(0, device=check_device(name)).device  # with its number


def check_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError for what is none of the three dtypes."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16; got {dtype}")


def check_dense(name: str, tensor: Any) -> None:
    """Raises TypeError for what is no dense tensor of float32, bfloat16 or float16."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {kind_of(tensor)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16; got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got {tensor.layout}")


def check_image(x: Any) -> None:
    """Raises TypeError for what is no dense tensor of 16, 32 or 64 bits of floating point, ValueError where it is no
    image with pixels.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {kind_of(x)}")
    if x.dtype not in (*DTYPES, torch.float64) or x.layout != torch.strided:
        raise TypeError(
            "x must be a dense tensor of floating point (float32, float64, bfloat16 or float16); "
            f"got a {x.layout} one of {x.dtype}"
        )
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have the shape [B, C, H, W] with C, H, W > 0; got {list(x.shape)}")


def check_operand(name: str, operand: Any, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Raises TypeError for what is no dense tensor of x's dtype, or of ``dtypes``; ValueError for another shape, or
    another device than x's.
    """
    if not isinstance(operand, Tensor):
        raise TypeError(f"{name} must be a tensor; got {kind_of(operand)}")
    if operand.dtype not in (x.dtype, *dtypes) or operand.layout != torch.strided:
        allowed = " or ".join(map(str, dict.fromkeys((x.dtype, *dtypes))))
        raise TypeError(f"{name} must be a dense tensor of {allowed}; got a {operand.layout} one of {operand.dtype}")
    if operand.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}; got {list(operand.shape)}")
    if operand.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}; got {operand.device}")


def check_one_of(
    name: str, operand: Any, x: Tensor, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]
) -> None:
    """Raises TypeError for what is neither None nor a dense tensor of one of the dtypes; ValueError for a shape that is
    none of ``shapes``, or another device than x's.
    """
    if operand is None:
        return
    if not isinstance(operand, Tensor):
        raise TypeError(f"{name} must be a tensor or None; got {kind_of(operand)}")
    if operand.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}; got {operand.dtype}")
    if operand.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got {operand.layout}")
    if tuple(operand.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must have the shape {allowed}; got {list(operand.shape)}")
    if operand.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}; got {operand.device}")


def check_fields(instance: Any, mismatch: type[Exception] = ValueError) -> None:
    """Every field of a dataclass against its annotation; a list becomes the tuple that the annotation asks for.

    The annotations are msgspec's: ``Annotated[int, Meta(ge=1)]``, ``Literal["linear", "cosine"]``. Raises ValueError
    that names the field, its value and what it should be, and ``mismatch`` where the value has another type. An int is
    a float, and stays the int that it is; a bool is neither.
    """
    for name, annotation in _annotations(instance.__class__).items():
        value = getattr(instance, name)
        try:
            converted = msgspec.convert(value, annotation)
        except msgspec.ValidationError as error:
            kind = mismatch if ", got `" in str(error) else ValueError
            allowed = _allowed(annotation)
            told = f"; it must be one of {', '.join(map(repr, allowed))}" if allowed else ""
            raise kind(f"{name}={value!r} is not supported: {error}{told}") from None
        if isinstance(value, list):  # JSON has no tuples
            object.__setattr__(instance, name, converted)


@lru_cache
def _annotations(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _allowed(annotation: Any) -> tuple[Any, ...]:
    """The values that a ``Literal`` in the annotation lists, which msgspec's message leaves out."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return parts
    found = next((found for part in parts if (found := _allowed(part))), ())
    return (*found, None) if found and type(None) in parts else found
