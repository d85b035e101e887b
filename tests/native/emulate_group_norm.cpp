// csrc/cuda/group_norm_silu.cu itself, launcher and kernel, on the CPU. test_group_norm_emulated.py runs it.
#include "cuda/group_norm_silu.cu"  // with cuda_on_cpu/cuda_runtime.h

extern "C" {
int emulate_group_norm_silu(const fastdiff::GroupNormSiluParams* p, bool reverse) {
    cuda_on_cpu::reverse_threads = reverse;
    return fastdiff::group_norm_silu_cuda(*p, nullptr);
}
int64_t size_of_params() { return sizeof(fastdiff::GroupNormSiluParams); }
}
