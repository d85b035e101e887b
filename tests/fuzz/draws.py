"""What random calls are made of: tensors of all layouts, and junk."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HUGE = 10**400


@dataclass
class Call:
    """One call: what it is, how it runs, and what its result must be.

    Attributes:
        text: for the report; tensors by their shape, strides and dtype.
        run: makes the call.
        check: raises AssertionError where the result is wrong.
        refused: whether ValueError or TypeError is right, too.
        names: words of which a refusal's message must have one; empty where any sentence will do.
    """

    text: str
    run: Callable[[], Any]
    check: Callable[[Any], None] = lambda result: None
    refused: bool = False
    names: tuple[str, ...] = ()


class Wrong(AssertionError):
    """A call that failed, and why."""


def attempt(call: Call) -> None:
    """Make a call; raises Wrong where it fails."""
    try:
        result = call.run()
    except (ValueError, TypeError) as error:
        message = str(error)
        if not call.refused:
            raise Wrong(f"refused: {type(error).__name__}: {message}") from error
        if len(message.split()) < 4 or (call.names and not re.search(rf"\b({'|'.join(call.names)})\b", message)):
            raise Wrong(f"an unclear {type(error).__name__}: {message!r}") from error
    except RuntimeError as error:
        if not (call.refused and re.search(r"meta tensors hold no numbers|cannot serve", str(error))):
            raise Wrong(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}") from error
    else:
        try:
            call.check(result)
        except Exception as error:
            raise Wrong(f"a wrong result: {type(error).__name__}: {error}") from error


class Draw(random.Random):
    """A call's source of random numbers."""

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def shape(self, low: int = 0, high: int = 5, least: int = 0) -> tuple[int, ...]:
        """Small, with empty and odd sizes, now and then one beyond a vector or a thread's share."""
        sizes = [self.choice((least, 1, 2, 3, 4, 5, 7, 8)) for _ in range(self.randint(low, high))]
        if sizes and self.chance(0.2):
            sizes[self.randrange(len(sizes))] = self.choice((16, 17, 33, 64, 100, 257))
        if len(sizes) == 2 and self.chance(0.1):
            sizes = [self.randint(1, 2), 70_001]
        return tuple(sizes)

    def dtype(self) -> torch.dtype:
        return self.choice(DTYPES)

    def values(self, shape: Iterable[int], dtype: torch.dtype = torch.float32, special: float = 0.0) -> Tensor:
        """Normals of some scale; of the share ``special`` of calls some are NaN, infinite, tiny or huge."""
        generator = torch.Generator().manual_seed(self.getrandbits(48))
        size = self.choice((1.0, 1.0, 1.0, 1e-3, 30.0))
        x = torch.randn(tuple(shape), generator=generator) * size
        if x.numel() and self.chance(special):
            for _ in range(self.randint(1, 3)):
                x.view(-1)[self.randrange(x.numel())] = self.choice(
                    (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38, -3e38, 65504.0)
                )
        return x.to(dtype)

    def laid(self, x: Tensor) -> Tensor:
        """The same values in other memory: permuted, sliced, between gaps, misaligned; or as they are."""
        kind = self.randrange(7)
        if not x.ndim or kind == 0:
            return x
        if kind == 1:
            order = self.sample(range(x.ndim), x.ndim)
            back = [order.index(i) for i in range(x.ndim)]
            return x.permute(order).contiguous().permute(back)
        if kind == 2:
            at = self.randrange(x.ndim)
            wide = torch.full([2 * n + 1 if i == at else n for i, n in enumerate(x.shape)], math.nan).to(x.dtype)
            view = wide[tuple(slice(1, None, 2) if i == at else slice(None) for i in range(x.ndim))]
        elif kind == 3:
            view = torch.full((x.numel() + 3,), math.nan).to(x.dtype)[self.randint(1, 3) :][: x.numel()].view(x.shape)
        elif kind == 4 and x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        elif kind == 5 and x.ndim >= 2 and x.shape[1]:
            wide = torch.full((x.shape[0], x.shape[1] + 2, *x.shape[2:]), math.nan).to(x.dtype)
            if x.ndim == 4 and self.chance(0.5):
                wide = wide.contiguous(memory_format=torch.channels_last)
            view = wide[:, 1:-1]
        else:
            return x
        return view.copy_(x)

    def shared(self, x: Tensor) -> Tensor:
        """A tensor of x's shape whose elements share memory: expanded, or with overlapping strides."""
        if x.numel() and x.ndim and self.chance(0.5):
            at = self.randrange(x.ndim)
            return x.narrow(at, 0, 1).expand_as(x)
        strides = [self.choice((0, 1, 1, 2, 3)) for _ in x.shape]
        count = 1 + sum(s * (n - 1) for s, n in zip(strides, x.shape, strict=True) if n)
        return self.values((max(count, 1),), x.dtype).as_strided(x.shape, strides)

    def tensor(self, shape: Iterable[int], dtype: torch.dtype = torch.float32, special: float = 0.0) -> Tensor:
        x = self.values(shape, dtype, special)
        return self.shared(x) if self.chance(0.08) else self.laid(x)

    def junk(self) -> Any:
        """A value of any kind."""
        small = torch.zeros(self.shape(0, 4))
        return self.choice(
            (
                lambda: None, lambda: True, lambda: "", lambda: "x", lambda: b"x", lambda: [], lambda: {},
                lambda: object(), lambda: print, lambda: -1, lambda: 0, lambda: 3, lambda: HUGE, lambda: -HUGE,
                lambda: 1 << 63, lambda: 1 << 64, lambda: 0.5, lambda: -0.5, lambda: math.nan, lambda: math.inf,
                lambda: 1e39, lambda: np.float32(0.5), lambda: np.int64(3), lambda: np.int8(-3), lambda: np.zeros(3),
                lambda: (1, 2), lambda: (None, "a"), lambda: [math.nan], lambda: {1: 2}, lambda: torch.float32,
                lambda: small, lambda: small.long(), lambda: small.double(), lambda: small.bool(),
                lambda: small.to(torch.complex64), lambda: small.to(torch.float8_e4m3fn), lambda: small.to("meta"),
                lambda: small.to_sparse() if small.ndim else small, lambda: torch.tensor(0.5), lambda: [small, small],
                lambda: small.requires_grad_(), lambda: 1j, lambda: range(3), lambda: "cuda:99", lambda: "reference",
            )
        )()  # fmt: skip


def told(value: Any) -> str:
    """A value in a report."""
    if isinstance(value, Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')} {list(value.shape)} strides {list(value.stride())}>" if (
            value.layout == torch.strided
        ) else f"<{value.dtype} {list(value.shape)} {value.layout}>"  # fmt: skip
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(told, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {told(v)}" for k, v in value.items()) + "}"
    if isinstance(value, int) and abs(value) > 1 << 70:
        return "a huge int"
    return repr(value)[:200]


def call_text(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    return f"{name}({', '.join([*map(told, args), *(f'{k}={told(v)}' for k, v in options.items())])})"


def spoiled(draw: Draw, function: Callable[..., Any], options: dict[str, Any], count: int = 1) -> Call:
    """A call of keywords of which one or more are junk: it works, or is refused by name."""
    import inspect

    names = tuple(inspect.signature(function).parameters)
    options = dict(options)
    for name in draw.sample(names, min(len(names), count)):
        options[name] = draw.junk()
    return Call(
        call_text(function.__name__, (), options), lambda: function(**options), refused=True,
        names=(*names, "q", "x0"),
    )  # fmt: skip
