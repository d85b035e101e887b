"""Who draws what: the seeds and sample numbers of a batch (docs/noise.md: the noise stream, version 1).

The normal at (seed, sample, draw, stream, element) is a pure function of those numbers, so a batch is described by a
seed and a sample number for each of its members. ``stream`` is 0 for x_T and for noising an initial image, 1 for the
sampler's noise, 2 for ``add_noise``, 3 for a known image's noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import check_int

INITIAL, SAMPLER, TRAINING, KNOWN = 0, 1, 2, 3


@dataclass(slots=True)
class NoiseKey:
    """The seeds and sample numbers of a batch: one seed and consecutive numbers, or two int64 tensors [B]."""

    seed: int = 0
    sample_offset: int = 0
    seeds: Tensor | None = None  # unsigned 64 bits carried as int64
    samples: Tensor | None = None

    def lists(self, batch: int) -> tuple[list[int], list[int]]:
        """Unsigned seeds and sample numbers as Python ints (reads the device, where they are tensors)."""
        seeds = [self.seed] * batch if self.seeds is None else [s & _U64 for s in self.seeds.tolist()]
        offset = self.sample_offset
        return seeds, list(range(offset, offset + batch)) if self.samples is None else self.samples.tolist()

    def tensors(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same as two int64 tensors [B] on a device."""
        seeds, samples = self.seeds, self.samples
        if seeds is None:
            seeds = torch.full((batch,), _signed(self.seed), dtype=torch.int64, device=device)
        if samples is None:
            samples = torch.arange(self.sample_offset, self.sample_offset + batch, device=device)
        return seeds, samples


def noise_key(
    batch: int, device: torch.device, seed: int = 0, seeds: Sequence[int] | None = None, sample_offset: int = 0
) -> NoiseKey:
    """The key of a batch of public arguments.

    ``seed`` numbers the samples sample_offset, sample_offset + 1, …; ``seeds`` gives each sample its own seed and
    sample number 0. Raises TypeError or ValueError where a seed is not an int in [0, 2⁶⁴), or a number not in [0, 2³²).
    """
    seed = check_int("seed", seed, 0, _U64)
    if seeds is None:
        if batch > 1 << 32:
            raise ValueError(f"a batch has at most 2**32 samples; got {batch}")
        return NoiseKey(seed, check_int("sample_offset", sample_offset, 0, (1 << 32) - max(batch, 1)))
    seeds = seeds.tolist() if isinstance(seeds, np.ndarray) and seeds.ndim == 1 else seeds
    if isinstance(seeds, str) or not isinstance(seeds, (Sequence, Tensor)):
        raise TypeError(f"seeds must be a sequence of ints; got {type(seeds).__name__}")
    if isinstance(seeds, Tensor) and (seeds.layout != torch.strided or seeds.is_meta or seeds.is_quantized):
        raise TypeError("seeds must be a sequence of ints, or a dense tensor of them")
    if isinstance(seeds, Tensor) and seeds.ndim != 1:
        raise ValueError(f"seeds must have one entry a sample, {batch}; got a tensor of shape {list(seeds.shape)}")
    values = seeds.tolist() if isinstance(seeds, Tensor) else list(seeds)
    if len(values) != batch:
        raise ValueError(f"seeds must have one entry a sample, {batch}; got {len(values)}")
    if seed != 0:
        raise ValueError(f"give seed or seeds, not both; got seed={seed}")
    if check_int("sample_offset", sample_offset, 0, (1 << 32) - 1) != 0:
        raise ValueError(f"sample_offset goes with seed, not with seeds; got {sample_offset}")
    values = [check_int(f"seeds[{i}]", value, 0, _U64) for i, value in enumerate(values)]
    signed = torch.tensor([_signed(value) for value in values], dtype=torch.int64, device=device)
    return NoiseKey(seeds=signed, samples=torch.zeros_like(signed))


_U64 = (1 << 64) - 1


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >> 63 else seed
