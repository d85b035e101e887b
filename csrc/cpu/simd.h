// The vector lane type of this build (FASTDIFF_WIDTH lanes, namespace FASTDIFF_SIMD), its loads and its stores.
// GCC/Clang vector extensions carry the arithmetic; intrinsics stand only where the extensions have no word.
#pragma once

#include <algorithm>

#include "common/lane.h"
#include "common/normal.h"
#include "common/half.h"
#include "fastdiff.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastdiff {
namespace FASTDIFF_SIMD {

constexpr int W = FASTDIFF_WIDTH;

struct Simd {
    typedef float F __attribute__((vector_size(W * 4)));
    typedef int32_t I __attribute__((vector_size(W * 4)));
    typedef uint32_t U __attribute__((vector_size(W * 4)));

    // Not F{} + a, which is another number where a is -0, and so an addition before the broadcast.
    static FASTDIFF_HD F splat(float a) { return a - F{}; }
    static FASTDIFF_HD U splat_uint(uint32_t a) { return U{} + a; }
    static FASTDIFF_HD F from_int(I a) { return __builtin_convertvector(a, F); }
    static FASTDIFF_HD I is_less(F a, F b) { return a < b; }
    static FASTDIFF_HD F select(I mask, F a, F b) {
        return bit_cast<F>((bit_cast<I>(a) & mask) | (bit_cast<I>(b) & ~mask));
    }
    static FASTDIFF_HD F from_uint(U a) {
#if defined(__AVX512F__)
        return __builtin_convertvector(a, F);
#else
        // Two exact halves and one rounding.
        const F high = from_int(bit_cast<I>(a >> 16)), low = from_int(bit_cast<I>(a & 0xffffu));
        return high * 65536.0f + low;
#endif
    }
    static FASTDIFF_HD F sqrt(F a) {
#if defined(__AVX512F__)
        return (F)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
        return (F)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE2__)
        return (F)_mm_sqrt_ps((__m128)a);
#else
        for (int i = 0; i < W; ++i) a[i] = sqrtf(a[i]);
        return a;
#endif
    }
    // The 64-bit products of even and odd lanes, then their halves put back in place.
    static FASTDIFF_HD void mulhilo(U a, uint32_t m, U& hi, U& lo) {
#if defined(__AVX512F__)
        const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
        const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
        const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
        hi = (U)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
        lo = (U)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
        const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
        const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
        const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
        hi = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
        lo = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#elif defined(__SSE2__)
        const __m128i factor = _mm_set1_epi32(static_cast<int>(m));
        const __m128i even = _mm_mul_epu32((__m128i)a, factor);
        const __m128i odd = _mm_mul_epu32(_mm_srli_epi64((__m128i)a, 32), factor);
        const __m128i low = _mm_set1_epi64x(0xffffffff);
        hi = (U)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_andnot_si128(low, odd));
        lo = (U)_mm_or_si128(_mm_and_si128(low, even), _mm_slli_epi64(odd, 32));
#else
        for (int i = 0; i < W; ++i) {
            uint32_t h, l;
            Scalar::mulhilo(a[i], m, h, l);
            hi[i] = h;
            lo[i] = l;
        }
#endif
    }
};

// a b + c, in one rounding where the CPU has it: nothing of the noise stream or of a plan's rows may use it, since the
// vector widths would differ in the last bit.
FASTDIFF_HD Simd::F fma(Simd::F a, Simd::F b, Simd::F c) {
#if defined(__AVX512F__)
    return (Simd::F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Simd::F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Quads are distributed to lanes so that a transpose within each group of four lanes puts elements in order:
// lane 4 g + j holds quad (W / 4) j + g, and after transpose4 vector j holds elements W j .. W j + W - 1.
inline Simd::U first_quads() {
    Simd::U quads = {};
    for (int lane = 0; lane < W; ++lane) quads[lane] = (W / 4) * (lane % 4) + lane / 4;
    return quads;
}

FASTDIFF_HD void transpose4(Simd::F z[4]) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
    using D = __m512d;
    using S = __m512;
#define FASTDIFF_MM(name) _mm512_##name
#elif defined(__AVX2__)
    using D = __m256d;
    using S = __m256;
#define FASTDIFF_MM(name) _mm256_##name
#else
    using D = __m128d;
    using S = __m128;
#define FASTDIFF_MM(name) _mm_##name
#endif
    const S ab_low = FASTDIFF_MM(unpacklo_ps)((S)z[0], (S)z[1]), ab_high = FASTDIFF_MM(unpackhi_ps)((S)z[0], (S)z[1]);
    const S cd_low = FASTDIFF_MM(unpacklo_ps)((S)z[2], (S)z[3]), cd_high = FASTDIFF_MM(unpackhi_ps)((S)z[2], (S)z[3]);
    z[0] = (Simd::F)FASTDIFF_MM(unpacklo_pd)((D)ab_low, (D)cd_low);
    z[1] = (Simd::F)FASTDIFF_MM(unpackhi_pd)((D)ab_low, (D)cd_low);
    z[2] = (Simd::F)FASTDIFF_MM(unpacklo_pd)((D)ab_high, (D)cd_high);
    z[3] = (Simd::F)FASTDIFF_MM(unpackhi_pd)((D)ab_high, (D)cd_high);
#undef FASTDIFF_MM
#else
    const Simd::F in[4] = {z[0], z[1], z[2], z[3]};
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < W; ++i) z[j][i] = in[i % 4][(i / 4) * 4 + j];
#endif
}

// Work is distributed in groups of eight vectors: two Philox blocks of W lanes and four normals each.
constexpr int kVectors = 8;
constexpr int kGroup = kVectors * W;

FASTDIFF_HD int64_t groups_in(int64_t n) { return (n + kGroup - 1) / kGroup; }

// Walks the groups of a [batch, n] array: group number `group` begins at element `first` of sample b.
struct Cursor {
    int64_t group, n, b, first;

    Cursor(int64_t group, int64_t n)
        : group(group), n(n), b(group / groups_in(n)), first(group % groups_in(n) * kGroup) {}
    void advance() {
        ++group;
        first += kGroup;
        if (first < n) return;
        first = 0;
        ++b;
    }
};

// Whether the n elements of a sample are contiguous.
FASTDIFF_HD bool is_dense(const View& v, int64_t n) { return v.inner == n && v.inner_stride == 1; }

// The address of element e of sample b, in elements.
FASTDIFF_HD int64_t offset(const View& v, int64_t b, int64_t e, int64_t n) {
    if (v.inner == n) return b * v.batch_stride + e * v.inner_stride;
    return b * v.batch_stride + (e / v.inner) * v.outer_stride + (e % v.inner) * v.inner_stride;
}

inline float load_one(const View& v, int64_t at) {
    if (v.dtype == kFloat32) return static_cast<const float*>(v.data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(v.data)[at];
    return v.dtype == kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

inline void store_one(const View& v, int64_t at, float value) {
    if (v.dtype == kFloat32)
        static_cast<float*>(v.data)[at] = value;
    else
        static_cast<uint16_t*>(v.data)[at] = v.dtype == kBFloat16 ? float_to_bfloat16(value) : float_to_half(value);
}

// Calls visit(i, address) for count elements of sample b from element e, walking the strides without a division each.
template <class Visit>
inline void walk(const View& v, int64_t b, int64_t e, int count, int64_t n, Visit visit) {
    int64_t at = offset(v, b, e, n), inner = v.inner == n ? n : e % v.inner;
    if (v.inner == n) inner = e;
    for (int i = 0; i < count; ++i) {
        visit(i, at);
        at += v.inner_stride;
        if (++inner == v.inner && v.inner != n) {
            inner = 0;
            at += v.outer_stride - v.inner * v.inner_stride;
        }
    }
}

__attribute__((noinline)) inline Simd::F load_slow(const View& v, int64_t b, int64_t e, int count, int64_t n) {
    Simd::F result = {};
    walk(v, b, e, count, n, [&](int i, int64_t at) { result[i] = load_one(v, at); });
    return result;
}

__attribute__((noinline)) inline void store_slow(const View& v, int64_t b, int64_t e, int count, int64_t n, Simd::F f) {
    walk(v, b, e, count, n, [&](int i, int64_t at) { store_one(v, at, f[i]); });
}

typedef uint16_t H __attribute__((vector_size(W * 2)));

// W elements from the one at `at`, as float32; they are contiguous.
FASTDIFF_HD Simd::F load_dense(const View& v, int64_t at) {
    Simd::F result = {};
    if (__builtin_expect(v.dtype == kFloat32, 1)) {
        memcpy(&result, static_cast<const float*>(v.data) + at, sizeof(result));
        return result;
    }
    H half;
    memcpy(&half, static_cast<const uint16_t*>(v.data) + at, sizeof(half));
    if (v.dtype == kBFloat16) return bit_cast<Simd::F>(__builtin_convertvector(half, Simd::U) << 16);
#if defined(__AVX512F__)
    return (Simd::F)_mm512_cvtph_ps(bit_cast<__m256i>(half));
#elif defined(__F16C__)
    return (Simd::F)_mm256_cvtph_ps(bit_cast<__m128i>(half));
#else
    for (int i = 0; i < W; ++i) result[i] = half_to_float(half[i]);
    return result;
#endif
}

FASTDIFF_HD void store_dense(const View& v, int64_t at, Simd::F f) {
    if (__builtin_expect(v.dtype == kFloat32, 1)) {
        memcpy(static_cast<float*>(v.data) + at, &f, sizeof(f));
        return;
    }
    H half = {};
    if (v.dtype == kBFloat16) {
        const Simd::U rounded = round_to_bfloat16(bit_cast<Simd::U>(f)) >> 16;
        const Simd::I nan = f != f;
        half = __builtin_convertvector((rounded & ~bit_cast<Simd::U>(nan)) | (0x7fc0u & bit_cast<Simd::U>(nan)), H);
    } else {
#if defined(__AVX512F__)
        half = bit_cast<H>(_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
        half = bit_cast<H>(_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
        for (int i = 0; i < W; ++i) half[i] = float_to_half(f[i]);
#endif
    }
    memcpy(static_cast<uint16_t*>(v.data) + at, &half, sizeof(half));
}

// count lanes (W, but for a sample's end) from element e of sample b, as float32.
FASTDIFF_HD Simd::F load(const View& v, int64_t b, int64_t e, int count, int64_t n) {
    if (__builtin_expect(count == W && is_dense(v, n), 1)) return load_dense(v, b * v.batch_stride + e);
    return load_slow(v, b, e, count, n);
}

FASTDIFF_HD void store(const View& v, int64_t b, int64_t e, int count, int64_t n, Simd::F f) {
    if (__builtin_expect(count == W && is_dense(v, n), 1))
        store_dense(v, b * v.batch_stride + e, f);
    else
        store_slow(v, b, e, count, n, f);
}

// The normals of the group that begins at element `first` of a sample. The two blocks take turns round by round: either
// alone waits for its own multiplications.
FASTDIFF_HD void normal_group(Simd::U quads, int64_t first, uint32_t sample, uint32_t draw, uint32_t stream,
                              uint64_t seed, Simd::F z[kVectors]) {
    using U = Simd::U;
    const U quad = quads + static_cast<uint32_t>(first / 4);
    U a[4] = {quad, U{} + sample, U{} + draw, U{} + stream}, b[4] = {quad + W, a[1], a[2], a[3]};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        philox_round<Simd>(a, U{} + k0, U{} + k1);
        philox_round<Simd>(b, U{} + k0, U{} + k1);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    box_muller<Simd>(a[0], a[1], z[0], z[1]);
    box_muller<Simd>(a[2], a[3], z[2], z[3]);
    box_muller<Simd>(b[0], b[1], z[4], z[5]);
    box_muller<Simd>(b[2], b[3], z[6], z[7]);
    transpose4(z);
    transpose4(z + 4);
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
