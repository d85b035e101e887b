"""The noise stream, version 1, in plain PyTorch: what csrc/common/normal.h computes, operation by operation.

Words are int64 tensors, because torch's uint32 has no shift and no addition on the CPU. Only multiply, add and a square
root taken in float64 are used, each as its own eager operation: addcmul and add(alpha=) would fuse and change bits.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_BLOCK = 1 << 18  # quads at a time: int64 temporaries stay in the cache


def philox4x32(counter: tuple[torch.Tensor, ...], k0: int, k1: int) -> tuple[torch.Tensor, ...]:
    """One Philox4x32-10 block a counter (Salmon et al. 2011): four int64 tensors of 32-bit words in, four out."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _mulhilo(c0, 0xD2511F53)
        high1, low1 = _mulhilo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _mulhilo(a: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    # 32 x 16 bits twice, so that no product leaves int64.
    low = a * (m & 0xFFFF)
    high = a * (m >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def log_unit(u: torch.Tensor) -> torch.Tensor:
    """ln u for float32 u in [2^-33, 1]."""
    bits = u.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1.0
    k = e.to(torch.float32)
    p = f * -0.07634492963552475 + 0.12761574983596802
    p = p * f + -0.13160182535648346
    p = p * f + 0.14201758801937103
    p = p * f + -0.16623356938362122
    p = p * f + 0.20001226663589478
    p = p * f + -0.2500081956386566
    p = p * f + 0.3333333134651184
    ff = f * f
    y = ff * f * p
    y = y + k * -2.12194440e-4
    y = y - ff * 0.5
    return (f + y) + k * 0.693359375


def box_muller(w0: torch.Tensor, w1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 normals of two int64 tensors of 32-bit words."""
    u = w0.to(torch.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # Correctly rounded: eager float32 sqrt is an ulp off for a fifth of its inputs on the CPU.
    r = (log_unit(u) * -2.0).to(torch.float64).sqrt().to(torch.float32)
    turned = (w1 + 0x20000000) & _MASK
    quadrant = turned >> 30
    rest = (turned & 0x3FFFFFFF) - 0x20000000
    a = rest.to(torch.float32) * 1.4629180792671596e-9
    aa = a * a
    s = aa * -0.0001951729936990887 + 0.008332177996635437
    s = s * aa + -0.16666655242443085
    s = s * aa * a + a
    c = aa * 2.4438451873720624e-05 + -0.001388736767694354
    c = c * aa + 0.04166664555668831
    c = c * aa * aa - aa * 0.5 + 1.0
    odd = (quadrant & 1) == 1
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    cosine = torch.where(((quadrant + 1) & 2) == 2, -cosine, cosine)
    sine = torch.where((quadrant & 2) == 2, -sine, sine)
    return r * cosine, r * sine


def normals(n: int, seed: int, sample: int, draw: int, stream: int, device: torch.device) -> torch.Tensor:
    """Normals 0 … n−1 of one sample, float32 [n]. ``seed`` is unsigned 64 bits, the other numbers 32."""
    quads = (n + 3) // 4
    out = torch.empty(quads * 4, dtype=torch.float32, device=device)
    for begin in range(0, quads, _BLOCK):
        quad = torch.arange(begin, min(begin + _BLOCK, quads), dtype=torch.int64, device=device)
        words = philox4x32((quad, *(torch.full_like(quad, word) for word in (sample, draw, stream))),
                           seed & _MASK, seed >> 32)  # fmt: skip
        block = out[4 * begin : 4 * (begin + quad.numel())].view(-1, 4)
        block[:, 0], block[:, 1] = box_muller(words[0], words[1])
        block[:, 2], block[:, 3] = box_muller(words[2], words[3])
    return out[:n]


def randn(
    shape: tuple[int, ...], seeds: list[int], samples: list[int], draw: int, stream: int, device: torch.device
) -> torch.Tensor:
    """float32 [B, …] with ``seeds`` (unsigned) and ``samples`` given for each of the B samples."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    n = out[0].numel() if shape[0] else 0
    for b, (seed, sample) in enumerate(zip(seeds, samples, strict=True)):
        out[b] = normals(n, seed, sample, draw, stream, device).view(shape[1:])
    return out
