"""What tests/triton_aot.py compiles of group_norm_silu."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch

from fastdiff.ops.group_norm_silu.triton_impl import Launch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SIZES = {"8": (256, 32, 32), "12": (384, 32, 32), "10": (320, 32, 16), "16": (512, 32, 64), "1152": (1152, 1, 16)}
KERNELS = ("whole", "statistics", "normalise")
ONE_EACH = (
    "group_norm_silu whole bf16 channels_last 8 all",
    "group_norm_silu statistics bf16 channels_last 16 all",
    "group_norm_silu normalise f32 contiguous 16 all",
)


def launch(kernel: str, dtype: str, layout: str, size: str, operands: str) -> None:
    """One kernel, for groups of ``size`` channels; "all" operands straddle x and x2, "plain" is x alone."""
    channels, groups, side = SIZES[size]

    def image(channels: int) -> torch.Tensor:
        return torch.empty(2, channels, side, side, dtype=DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])

    every, first = operands == "all", channels // 2 - 2
    weight = torch.empty(channels, dtype=DTYPES[dtype]) if every else None
    call = Launch(
        image(channels), image(first if every else channels), image(channels - first) if every else None,
        torch.empty(2, channels) if every else None, weight, weight, groups, 1e-5, every, layout == "channels_last",
    )  # fmt: skip
    if kernel == "whole":
        call.whole()
    else:
        getattr(call, kernel)(call.partial())


def variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """The whole matrix: a name, and a call that launches one kernel."""
    for dtype, layout, size, operands in product(DTYPES, LAYOUTS, SIZES, ("plain", "all")):
        for kernel in KERNELS[1:] if size in ("16", "1152") else KERNELS[:1]:
            name = f"group_norm_silu {kernel} {dtype} {layout} {size} {operands}"
            yield name, lambda k=kernel, d=dtype, m=layout, s=size, o=operands: launch(k, d, m, s, o)
