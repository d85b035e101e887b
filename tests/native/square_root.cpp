// The square roots of the lane types that csrc/cpu compiles, over whole arrays. tests/ops/test_square_root.py checks them.
#include "cpu/simd.h"

extern "C" int width() { return fastdiff::FASTDIFF_SIMD::W; }

// n is a multiple of the width.
extern "C" void square_root(const float* in, float* out, int64_t n) {
    using fastdiff::FASTDIFF_SIMD::Simd;
    for (int64_t i = 0; i < n; i += fastdiff::FASTDIFF_SIMD::W) {
        Simd::F f;
        memcpy(&f, in + i, sizeof(f));
        f = Simd::sqrt(f);
        memcpy(out + i, &f, sizeof(f));
    }
}

extern "C" void scalar_square_root(const float* in, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = fastdiff::Scalar::sqrt(in[i]);
}
