"""What tests/triton_aot.py compiles of conv_epilogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from fastdiff.ops.conv_epilogue.triton_impl import conv_epilogue

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OPERANDS = ("bias", "add", "residual", "bias+add+residual")
ONE_EACH = ("conv_epilogue bf16 channels_last bias+add+residual", "conv_epilogue f32 contiguous bias+add+residual")


def launch(dtype: str, layout: str, operands: str, channels: int = 192) -> None:
    def image() -> Tensor:
        return torch.empty(2, channels, 16, 16, dtype=DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])

    bias, add = torch.empty(channels, dtype=DTYPES[dtype]), torch.empty(2, channels, dtype=DTYPES[dtype])
    conv_epilogue(
        image(), image(), bias if "bias" in operands else None, add if "add" in operands else None,
        image() if "residual" in operands else None, 0.5 if operands == "residual" else 1.0,
    )  # fmt: skip


def wide() -> None:
    """2³¹ rows of one element."""
    x = torch.empty(1, 1, 1).expand(1, 1 << 31, 1)
    conv_epilogue(x, x, None, torch.empty(1, 1).expand(1, 1 << 31), None, 0.5)


def strided() -> None:
    """A contiguous output, everything else channels_last, of a channel count that no vector divides."""
    out, x = torch.empty(2, 15, 9, 7), torch.empty(2, 9, 7, 15).permute(0, 3, 1, 2)
    conv_epilogue(out, x, torch.empty(15), torch.empty(1, 15), x, 0.5)


def variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """The whole matrix: a name, and a call that launches one kernel."""
    for dtype, layout, operands in product(DTYPES, LAYOUTS, OPERANDS):
        yield (
            f"conv_epilogue {dtype} {layout} {operands}",
            lambda d=dtype, m=layout, o=operands: launch(d, m, o),
        )
    yield "conv_epilogue f32 wide", wide
    yield "conv_epilogue f32 strided", strided
