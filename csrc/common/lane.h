// A lane type says what F (float), I (int32) and U (uint32) are: scalars here, vectors in cpu/simd.h. The noise stream
// and the row arithmetic are written once, over a lane type, and compiled for every backend.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FASTDIFF_HD __host__ __device__ __forceinline__
#else
#define FASTDIFF_HD inline __attribute__((always_inline))
#endif

namespace fastdiff {

template <class To, class From>
FASTDIFF_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

struct Scalar {
    using F = float;
    using I = int32_t;
    using U = uint32_t;

    static FASTDIFF_HD F splat(float a) { return a; }
    static FASTDIFF_HD U splat_uint(uint32_t a) { return a; }
    static FASTDIFF_HD F sqrt(F a) {
#ifdef __CUDA_ARCH__
        return __fsqrt_rn(a);
#else
        return sqrtf(a);
#endif
    }
    static FASTDIFF_HD F from_int(I a) { return static_cast<float>(a); }
    static FASTDIFF_HD F from_uint(U a) { return static_cast<float>(a); }
    static FASTDIFF_HD I is_less(F a, F b) { return a < b ? -1 : 0; }
    static FASTDIFF_HD F select(I mask, F a, F b) { return mask ? a : b; }
    static FASTDIFF_HD void mulhilo(U a, uint32_t m, U& hi, U& lo) {
#ifdef __CUDA_ARCH__
        uint64_t product;  // nvcc makes a 64-bit multiplication, and needless additions, of what stands below
        asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(m));
#else
        const uint64_t product = static_cast<uint64_t>(a) * m;
#endif
        hi = static_cast<U>(product >> 32);
        lo = static_cast<U>(product);
    }
};

}  // namespace fastdiff
