// The sum of csrc/common/row.h's deviances over a block of kDevianceBlock elements, of which each of the CUDA block's
// threads has a quad. A test runs it on the CPU.
#pragma once

#include "cuda/launch.cuh"  // kThreads

namespace fastdiff {

// All threads take part; the first one gets the sum.
__device__ __forceinline__ float deviance_sum(Float4 mine) {
    static_assert(kDevianceBlock == 1024 && kThreads == 256, "written out for these");
    __shared__ float values[kDevianceBlock];
    const int t = static_cast<int>(threadIdx.x);
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i) values[4 * t + i] = mine.v[i];
    __syncthreads();
    float sum = (values[t] + values[t + 512]) + (values[t + 256] + values[t + 768]);
    FASTDIFF_UNROLL
    for (int half = 128; half >= 32; half /= 2) {
        __syncthreads();  // until all have read
        values[t] = sum;
        __syncthreads();
        if (t < half) sum = sum + values[t + half];
    }
    FASTDIFF_UNROLL
    for (int half = 16; half > 0; half /= 2) sum = sum + __shfl_down_sync(0xffffffffu, sum, half);
    __syncthreads();  // until all have read: the next sum writes to the same place
    return sum;
}

}  // namespace fastdiff
