// csrc/cuda/deviance_block.h on the CPU: blocks of threads that add up two blocks of elements one after the other.
// test_cuda_emulated.py runs it.
#include "cuda/deviance_block.h"  // with cuda_on_cpu/cuda_runtime.h

namespace fastdiff {

struct Sums {
    const float* values;
    float* sums;
};

void sum_kernel(Sums s) {
    for (int k = 0; k < 2; ++k) {
        const int64_t block = 2 * blockIdx.x + k;
        Float4 mine;
        memcpy(&mine, s.values + block * kDevianceBlock + 4 * threadIdx.x, sizeof(mine));
        const float sum = deviance_sum(mine);
        if (threadIdx.x == 0) s.sums[block] = sum;
    }
}

}  // namespace fastdiff

extern "C" void emulate_deviance_sums(const float* values, float* sums, int pairs, bool reverse) {
    cuda_on_cpu::reverse_threads = reverse;
    cudaLaunchConfig_t config;
    config.gridDim = dim3(pairs), config.blockDim = dim3(fastdiff::kThreads);
    cudaLaunchKernelEx(&config, fastdiff::sum_kernel, fastdiff::Sums{values, sums});
}
