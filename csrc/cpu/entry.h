// The kernels of one vector width, as dispatch.cpp calls them.
#pragma once

#include "fastdiff.h"

#define FASTDIFF_ENTRIES(simd)                                            \
    namespace simd {                                                      \
    void randn(const RandnParams& params, int threads);                   \
    void add_noise(const AddNoiseParams& params, int threads);            \
    void update(const UpdateParams& params, int threads);                 \
    void group_norm_silu(const GroupNormSiluParams& params, int threads); \
    void conv_epilogue(const ConvEpilogueParams& params, int threads);    \
    void winograd_conv(const WinogradConvParams& params, int threads);    \
    }

namespace fastdiff {
FASTDIFF_ENTRIES(portable)
FASTDIFF_ENTRIES(avx2)
FASTDIFF_ENTRIES(avx512)
}  // namespace fastdiff
