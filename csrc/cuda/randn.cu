// out[b, e] = the normal at (seed, sample, draw, stream, e).
#include "cuda/launch.cuh"    // kThreads, cover
#include "cuda/noise_quad.h"  // randn_quad

namespace fastdiff {

// ---------------------------------------------------------------------------------------------------------------------
// kernels

template <bool kWide>
__global__ void __launch_bounds__(kThreads)
    randn_kernel(const __grid_constant__ RandnParams p, const __grid_constant__ Grid grid) {
    const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (unit < grid.units) randn_quad<kWide>(p, locate(grid, unit));
}

// ---------------------------------------------------------------------------------------------------------------------
// launchers

int randn_cuda(const RandnParams& p, void* stream) {
    const Grid grid = Grid::of(p.batch, p.n);
    if (grid.units == 0) return cudaSuccess;
    unsigned blocks;
    if (!cover(grid, 1, blocks)) return cudaErrorInvalidConfiguration;
    const auto kernel = is_wide(p.out, p.n) ? randn_kernel<true> : randn_kernel<false>;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, grid);
    return cudaGetLastError();
}

}  // namespace fastdiff
