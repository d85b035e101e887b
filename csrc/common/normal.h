// The noise stream, version 1: the normal at (seed, sample, draw, stream, element), defined bit for bit.
// Philox4x32-10 (Salmon et al. 2011) makes four words a counter; Box-Muller makes two normals of two words.
// Only IEEE float32 multiply, add and correctly rounded square root are used, in the order written here: compile
// without contraction (-ffp-contract=off, -fmad=false). ops/randn/reference.py and ops/triton_noise.py mirror it line
// by line.
#pragma once

#include "common/lane.h"
#include "fastdiff.h"

namespace fastdiff {

template <class L>
FASTDIFF_HD void philox_round(typename L::U c[4], typename L::U k0, typename L::U k1) {
    using U = typename L::U;
    U hi0, lo0, hi1, lo1;
    L::mulhilo(c[0], 0xD2511F53u, hi0, lo0);
    L::mulhilo(c[2], 0xCD9E8D57u, hi1, lo1);
    c[0] = hi1 ^ c[1] ^ k0;
    c[1] = lo1;
    c[2] = hi0 ^ c[3] ^ k1;
    c[3] = lo0;
}

template <class L>
FASTDIFF_HD void philox(typename L::U c[4], typename L::U k0, typename L::U k1) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        philox_round<L>(c, k0, k1);
        k0 = k0 + 0x9E3779B9u;
        k1 = k1 + 0xBB67AE85u;
    }
}

// ln u for u in [2^-33, 1]: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and a minimax polynomial for
// (ln(1 + f) - f + f^2/2) / f^3, relative error 6e-9.
template <class L>
FASTDIFF_HD typename L::F log_unit(typename L::F u) {
    using F = typename L::F;
    using I = typename L::I;
    const I bits = bit_cast<I>(u);
    const I e = (bits - 0x3f3504f3) >> 23;
    const F f = bit_cast<F>(bits - (e << 23)) - 1.0f;
    const F k = L::from_int(e);
    F p = f * -0.07634492963552475f + 0.12761574983596802f;
    p = p * f + -0.13160182535648346f;
    p = p * f + 0.14201758801937103f;
    p = p * f + -0.16623356938362122f;
    p = p * f + 0.20001226663589478f;
    p = p * f + -0.2500081956386566f;
    p = p * f + 0.3333333134651184f;
    const F ff = f * f;
    F y = ff * f * p;
    y = y + k * -2.12194440e-4f;  // ln 2 in two parts; the product with the first is exact
    y = y - ff * 0.5f;
    return (f + y) + k * 0.693359375f;
}

// Two normals of two words: r = sqrt(-2 ln U), theta = 2 pi w1 / 2^32; z0 = r cos theta, z1 = r sin theta.
template <class L>
FASTDIFF_HD void box_muller(typename L::U w0, typename L::U w1, typename L::F& z0, typename L::F& z1) {
    using F = typename L::F;
    using I = typename L::I;
    using U = typename L::U;
    const F u = L::from_uint(w0) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
    const F r = L::sqrt(log_unit<L>(u) * -2.0f);
    // The angle's nearest multiple of pi/2 and the signed rest in [-pi/4, pi/4), exact as integers.
    const U turned = w1 + 0x20000000u;
    const I quadrant = bit_cast<I>(turned >> 30);
    const I rest = bit_cast<I>(turned & 0x3fffffffu) - 0x20000000;
    const F a = L::from_int(rest) * 1.4629180792671596e-9f;
    const F aa = a * a;
    F s = aa * -0.0001951729936990887f + 0.008332177996635437f;
    s = s * aa + -0.16666655242443085f;
    s = s * aa * a + a;
    F c = aa * 2.4438451873720624e-05f + -0.001388736767694354f;
    c = c * aa + 0.04166664555668831f;
    c = c * aa * aa - aa * 0.5f + 1.0f;
    // cos(a + q pi/2) is c, -s, -c, s and sin(a + q pi/2) is s, c, -s, -c for q = 0, 1, 2, 3.
    const I odd = -(quadrant & 1);
    const I cos_sign = ((quadrant + 1) & 2) << 30;
    const I sin_sign = (quadrant & 2) << 30;
    const F cosine = bit_cast<F>(bit_cast<I>(L::select(odd, s, c)) ^ cos_sign);
    const F sine = bit_cast<F>(bit_cast<I>(L::select(odd, c, s)) ^ sin_sign);
    z0 = r * cosine;
    z1 = r * sine;
}

// The four normals of elements 4 quad .. 4 quad + 3.
template <class L>
FASTDIFF_HD void normal4(typename L::U quad, uint32_t sample, uint32_t draw, uint32_t stream, uint64_t seed,
                         typename L::F z[4]) {
    using U = typename L::U;
    U c[4] = {quad, L::splat_uint(sample), L::splat_uint(draw), L::splat_uint(stream)};
    philox<L>(c, L::splat_uint(static_cast<uint32_t>(seed)), L::splat_uint(static_cast<uint32_t>(seed >> 32)));
    box_muller<L>(c[0], c[1], z[0], z[1]);
    box_muller<L>(c[2], c[3], z[2], z[3]);
}

// The seed and sample number of sample b.
FASTDIFF_HD uint64_t seed_of(const NoiseKey& key, int64_t b) {
    return key.seeds ? static_cast<uint64_t>(key.seeds[b]) : key.seed;
}
FASTDIFF_HD uint32_t sample_of(const NoiseKey& key, int64_t b) {
    return static_cast<uint32_t>(key.samples ? key.samples[b] : key.sample_offset + b);
}

}  // namespace fastdiff
