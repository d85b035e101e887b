// y sigmoid(y), within 2 ulp. The three vector widths may differ in the last bit, so nothing of the noise stream or of
// a plan's rows belongs here.
#pragma once

#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {

// 2^t = 2^floor(t) 2^f, with a minimax polynomial for 2^f on [0, 1]: relative error 9e-8, or 7.5e-5 where a result of 8
// bits (kRough) makes no more of it; 8.6e-5 with kOne, for which 2^0 is 1. 0 and infinity beyond float32's exponents; a
// NaN gives anything.
template <bool kRough, bool kOne = false>
FASTDIFF_HD Simd::F exp2(Simd::F t) {
    using F = Simd::F;
    constexpr float rough[2][4] = {
        {0.9999251961708069f, 0.6958335638046265f, 0.22606715559959412f, 0.07802452147006989f},
        {1.0f, 0.6951167864453953f, 0.22764499113539632f, 0.07706704207206941f}};
    constexpr float exact[2][6] = {{0.9999999403953552f, 0.6931530833244324f, 0.24015361070632935f,
                                    0.05582631751894951f, 0.00898933969438076f, 0.0018775766948238015f},
                                   {1.0f, 0.693151311675744f, 0.2401644465763306f, 0.05579992974195828f,
                                    0.009017007156090476f, 0.001867140334777451f}};
#if defined(__AVX512DQ__)
    const F f = (F)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    const float shift =
        12582912.0f;  // 1.5 2^23, where floats are 1 apart: adding it rounds, and the sum's low bits are the integer
    const F low = Simd::select(t < -126.0f, F{} - 126.0f, t);
    const F inside = Simd::select(t > 127.5f, F{} + 127.5f, low);
    const F shifted = (inside - 0.5f) + shift;
    const F f = inside - (shifted - shift);
#endif
    constexpr int degree = kRough ? 3 : 5;
    const float* const terms = kRough ? rough[kOne] : exact[kOne];
    F p = F{} + terms[degree];
    for (int i = degree - 1; i >= 0; --i) p = fma(p, f, F{} + terms[i]);
#if defined(__AVX512DQ__)
    return (F)_mm512_scalef_ps((__m512)p, (__m512)t);
#else
    const F result = bit_cast<F>(bit_cast<Simd::U>(p) + (bit_cast<Simd::U>(shifted) << 23));
    return Simd::select(t > 127.5f, F{} + __builtin_inff(), Simd::select(t < -126.0f, F{}, result));
#endif
}

template <bool kRough>
FASTDIFF_HD Simd::F silu(Simd::F y) {
    const Simd::F d = 1.0f + exp2<kRough>(y * -1.4426950408889634f);
#if defined(__AVX512F__)
    if (kRough) return y * (Simd::F)_mm512_rcp14_ps((__m512)d);  // relative error 2^-14
#endif
    return y / d;
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
