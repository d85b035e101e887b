"""The noise stream, version 1, for Triton kernels: csrc/common/normal.h line by line.

Launch with ``enable_fp_fusion=False`` (triton_support.launch does). ``tl.add`` and ``tl.mul`` stand where integers are
meant to wrap around.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 counter and key: four words."""
    for _ in tl.static_range(10):
        hi0, lo0 = tl.umulhi(c0, 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        hi1, lo1 = tl.umulhi(c2, 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def log_unit(u):
    """ln u for float32 u in [2^-33, 1]."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    k = e.to(tl.float32)
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


@triton.jit
def box_muller(w0, w1):
    """Two float32 normals of two uint32 words."""
    u = w0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    r = tl.sqrt_rn(log_unit(u) * -2.0)
    turned = tl.add(w1, 0x20000000, sanitize_overflow=False)
    quadrant = (turned >> 30).to(tl.int32, bitcast=True)
    rest = (turned & 0x3FFFFFFF).to(tl.int32, bitcast=True) - 0x20000000
    a = rest.to(tl.float32) * 1.4629180792671596e-9
    aa = a * a
    s = aa * -0.0001951729936990887 + 0.008332177996635437
    s = s * aa + -0.16666655242443085
    s = s * aa * a + a
    c = aa * 2.4438451873720624e-05 + -0.001388736767694354
    c = c * aa + 0.04166664555668831
    c = c * aa * aa - aa * 0.5 + 1.0
    odd = (quadrant & 1) != 0
    cos_sign = ((quadrant + 1) & 2) << 30
    sin_sign = (quadrant & 2) << 30
    cosine = (tl.where(odd, s, c).to(tl.int32, bitcast=True) ^ cos_sign).to(tl.float32, bitcast=True)
    sine = (tl.where(odd, c, s).to(tl.int32, bitcast=True) ^ sin_sign).to(tl.float32, bitcast=True)
    return r * cosine, r * sine


@triton.jit
def key_of(b, seeds, samples, seed, sample_offset):
    """The int64 seed and sample number of sample b; seeds and samples are pointers or None."""
    s = tl.cast(seed, tl.int64)
    if seeds is not None:
        s = tl.load(seeds + b)
    number = tl.cast(sample_offset, tl.int64) + b
    if samples is not None:
        number = tl.load(samples + b)
    return s, number


@triton.jit
def normals(first, seed, sample, draw, stream, QUADS: tl.constexpr):
    """Normals first … first + 4 QUADS − 1 of one sample, float32. first (int64) is a multiple of 4."""
    quad = (first // 4).to(tl.uint32) + tl.arange(0, QUADS).to(tl.uint32)
    w0, w1, w2, w3 = philox(
        quad, tl.cast(sample, tl.uint32), tl.cast(draw, tl.uint32), tl.cast(stream, tl.uint32),
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
    )  # fmt: skip
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    # [QUADS, 2, 2] with z0, z1, z2, z3 in row-major order.
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [4 * QUADS])
