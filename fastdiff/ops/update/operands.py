"""The tensors of one update: what a run sets once, and what changes with each network call."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastdiff.noise import NoiseKey
from fastdiff.plan.plan import SLOTS


@dataclass
class Operands:
    """Inputs and outputs of ``update`` for every backend. An output may be the input of the same name.

    ``outputs`` and ``variance`` are the network's, [B, …] of float32, bfloat16 or float16 with walkable strides
    (ops.view); so is ``model_input``. All else is contiguous float32 [B, …] unless said. None means absent.
    """

    x: Tensor
    x_out: Tensor | None
    table: Tensor  # float32 [rows, 48] on the tensors' device
    key: NoiseKey
    outputs: tuple[Tensor, ...] = ()
    variance: Tensor | None = None
    anchor: Tensor | None = None
    anchor_out: Tensor | None = None
    slots: list[Tensor | None] = field(default_factory=lambda: [None] * SLOTS)
    slots_out: list[Tensor | None] = field(default_factory=lambda: [None] * SLOTS)
    noise: Tensor | None = None  # drawn where a row needs it and it is absent
    gain: Tensor | None = None  # [B]
    clip: Tensor | None = None  # [B, 2]: bound and scale, in place of the row's
    gradient: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    known_noise: Tensor | None = None
    x0_out: Tensor | None = None
    model_input: Tensor | None = None
    host_table: Tensor | None = None  # the same rows, float64 on the CPU: what the reference reads
    nonfinite: Tensor | None = None  # int64 [1], lowered to the row's index where the network's output is not finite
    deviance: Tensor | None = None  # [rows, B, blocks]: row's entry is written where it draws noise (deviance.py)
