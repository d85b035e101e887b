// out = sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) z, with z given or drawn.
#include "cuda/launch.cuh"    // kThreads, cover
#include "cuda/noise_quad.h"  // has_wide_views, add_noise_quad

namespace fastdiff {

// ---------------------------------------------------------------------------------------------------------------------
// kernels

template <bool kWide>
__global__ void __launch_bounds__(kThreads)
    add_noise_kernel(const __grid_constant__ AddNoiseParams p, const __grid_constant__ Grid grid) {
    const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (unit < grid.units) add_noise_quad<kWide>(p, locate(grid, unit));
}

// ---------------------------------------------------------------------------------------------------------------------
// launchers

int add_noise_cuda(const AddNoiseParams& p, void* stream) {
    const Grid grid = Grid::of(p.batch, p.n);
    if (grid.units == 0) return cudaSuccess;
    unsigned blocks;
    if (!cover(grid, 1, blocks)) return cudaErrorInvalidConfiguration;
    const auto kernel = has_wide_views(p) ? add_noise_kernel<true> : add_noise_kernel<false>;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, grid);
    return cudaGetLastError();
}

}  // namespace fastdiff
