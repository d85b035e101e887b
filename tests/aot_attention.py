"""The attention kernel for triton_aot.py: every tuned head size and dtype, the last block of keys full or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch

from fastdiff.ops.attention.triton_impl import attention

HEAD_SIZES = (16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 256, 512)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
KEYS = {"even": 1024, "ragged": 1011}


def run(dtype: torch.dtype, D: int, M: int, tf32: bool) -> None:
    """Two heads of three samples; tensors as a projection leaves them, [B, N, H, D] seen as [B, H, N, D]."""
    q = torch.empty(3, 300, 2, D, dtype=dtype).transpose(1, 2)
    k, v = (torch.empty(3, M, 2, D, dtype=dtype).transpose(1, 2) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        attention(torch.empty(3, 300, 2, D, dtype=dtype), q, k, v, D**-0.5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """The whole matrix."""
    for dtype, D, keys in product((*DTYPES, "tf32"), HEAD_SIZES, KEYS):
        tf32 = dtype == "tf32"
        kind = DTYPES["f32" if tf32 else dtype]
        yield (
            f"attention {dtype} {D} {keys}",
            lambda kind=kind, D=D, M=KEYS[keys], tf32=tf32: run(kind, D, M, tf32),
        )
    for name, D, M in product(("bf16", "f16"), (256, 512), (256, 200)):
        yield f"attention {name} {D} short {M}", lambda kind=DTYPES[name], D=D, M=M: run(kind, D, M, False)


ONE_EACH = ("attention bf16 512 even", "attention f32 40 ragged")
