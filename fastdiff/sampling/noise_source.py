"""Where a run's noise comes from: the noise stream (drawn inside the kernels), torch's generators, or your function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastdiff.checks import kind_of
from fastdiff.noise import NoiseKey, noise_key
from fastdiff.ops.randn import fill
from fastdiff.sampling.state import noise_identity

NoiseFunction = Callable[[int, int, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class NoiseSource:
    """The noise of a run. ``draw`` makes a tensor, and is the argument ``author``; None means that kernels draw from
    the stream with ``key``.
    """

    shape: tuple[int, ...]
    device: torch.device
    key: NoiseKey
    draw: NoiseFunction | None = None
    author: str = "seed"

    @property
    def from_stream(self) -> bool:
        """Whether kernels draw the noise, so that nothing is made on the host."""
        return self.draw is None

    @cached_property
    def identity(self) -> str:
        """What a state says of whose noise it has."""
        return noise_identity(self.key, self.shape[0]) if self.draw is None else self.author

    def noise(self, stream: int, draw: int, backend: str) -> Tensor:
        """float32 [B, …], contiguous, on the run's device."""
        if self.draw is None:
            out = torch.empty(self.shape, dtype=torch.float32, device=self.device)
            fill(out, self.key, draw, stream, backend)
            return out
        z = self.draw(stream, draw, self.shape)
        if not isinstance(z, Tensor):
            raise TypeError(f"noise_fn({stream}, {draw}, shape) must return a tensor; got {kind_of(z)}")
        if tuple(z.shape) != self.shape or not z.is_floating_point() or z.layout != torch.strided or z.is_meta:
            raise ValueError(
                f"noise_fn({stream}, {draw}, shape) must return a dense floating-point tensor of shape "
                f"{list(self.shape)}; got {z.dtype} {list(z.shape)}, {z.layout} on {z.device}"
            )
        return z.to(device=self.device, dtype=torch.float32).contiguous()


def resolve_noise_source(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    seed: int | None,
    seeds: Sequence[int] | None,
    sample_offset: int | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    noise_fn: NoiseFunction | None,
) -> NoiseSource:
    """The noise of ``sample``'s arguments, of which at most one of seed, seeds, generator and noise_fn is given."""
    given = []
    for name, value in (("seed", seed), ("seeds", seeds), ("generator", generator), ("noise_fn", noise_fn)):
        if value is not None:
            given.append(name)
    if len(given) > 1:
        raise ValueError(f"give one of seed, seeds, generator and noise_fn; got {' and '.join(given)}")
    if sample_offset is not None and given not in ([], ["seed"]):
        raise ValueError(f"sample_offset goes with seed, not with {given[0]}")
    if noise_fn is not None:
        if not callable(noise_fn):
            raise TypeError(f"noise_fn must be callable; got {type(noise_fn).__name__}")
        return NoiseSource(shape, device, NoiseKey(), noise_fn, "noise_fn")
    if generator is not None:
        return NoiseSource(shape, device, NoiseKey(), _torch_noise(generator, shape[0], device, dtype), "generator")
    first = 0 if sample_offset is None else sample_offset
    return NoiseSource(shape, device, noise_key(shape[0], device, 0 if seed is None else seed, seeds, first))


def _torch_noise(
    generator: torch.Generator | Sequence[torch.Generator], batch: int, device: torch.device, dtype: torch.dtype
) -> NoiseFunction:
    """torch.randn as diffusers' pipelines call it: in the network's dtype, on the generator's device."""
    several = list(generator) if isinstance(generator, Sequence) else None
    for g in several if several is not None else [generator]:
        if not isinstance(g, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, or one an image; got {type(g).__name__}")
        if g.device.type not in ("cpu", device.type):
            raise ValueError(f"generator is on {g.device}; it must be on the CPU or on the model's device {device}")
    if several is not None and len(several) != batch:
        raise ValueError(f"generator must be one torch.Generator or one an image, {batch}; got {len(several)}")

    def draw(stream: int, number: int, shape: tuple[int, ...]) -> Tensor:
        if several is None:
            assert isinstance(generator, torch.Generator)
            return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(device)
        one = (1, *shape[1:])
        each = [torch.randn(one, generator=g, device=g.device, dtype=dtype).to(device) for g in several]
        return torch.cat(each) if each else torch.empty(shape, device=device)

    return draw
