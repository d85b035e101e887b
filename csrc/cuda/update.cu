// One row of a plan: guidance, x0, clipping, the linear combinations, the noise and the next network input, in one
// pass.
#include "cuda/deviance_block.h"  // deviance_sum
#include "cuda/launch.cuh"        // kThreads, cover
#include "cuda/update_quad.h"     // UpdateLaunch, is_plain, load_update, finish_update

namespace fastdiff {

// ---------------------------------------------------------------------------------------------------------------------
// kernels

// Two quads a thread where registers allow it: their loads are in flight together, and the row's tests are shared.
template <bool kPlain>
constexpr int kQuads = kPlain ? 2 : 1;

// Blocks that a multiprocessor holds at least: as many as registers allow without a spill, 64 and 80 a thread.
template <bool kPlain>
constexpr int kBlocks = kPlain ? 4 : 3;

// The row is fetched by the block's first threads while the state's loads, which need no row, are on their way; the
// barrier hands it to the others. In a captured graph its number is read from device memory (step), so that one graph
// serves every step.
//
// With kDeviance a sample's quads are filled up to whole blocks of kThreads, each of which adds up one block of
// elements.
template <bool kPlain, bool kWide, bool kDeviance>
__global__ void __launch_bounds__(kThreads, kBlocks<kPlain>) update_kernel(const __grid_constant__ UpdateLaunch u) {
    __shared__ Row row;
    const int64_t first = threadIdx.x + int64_t{blockIdx.x} * kThreads * kQuads<kPlain>;
    UpdateInputs<kPlain> in[kQuads<kPlain>];
#pragma unroll
    for (int k = 0; k < kQuads<kPlain>; ++k)
        if (first + k * kThreads < u.grid.units) load_update<kPlain, kWide, kDeviance>(u, first + k * kThreads, in[k]);

    const int64_t index = u.p.step ? __ldg(u.p.step) : u.p.row;
    constexpr int kColumns = sizeof(Row) / sizeof(float);
    if (threadIdx.x < kColumns)
        reinterpret_cast<float*>(&row)[threadIdx.x] = __ldg(u.p.table + index * kColumns + threadIdx.x);
    __syncthreads();

    bool bad = false;
#pragma unroll
    for (int k = 0; k < kQuads<kPlain>; ++k) {
        if (first + k * kThreads >= u.grid.units) continue;  // with kDeviance that is so of all threads or of none
        Float4 deviance = {};
        bad |= finish_update<kPlain, kWide, kDeviance>(u, row, in[k], deviance);
        if (kDeviance && (kPlain ? row.x.z != 0 : reads_z(row))) {
            const float sum = deviance_sum(deviance);
            const int64_t blocks = u.grid.quads / kThreads;
            if (threadIdx.x == 0)
                u.p.deviance[(index * u.p.batch + in[k].at.b) * blocks + in[k].at.e / kDevianceBlock] = sum;
        }
    }

    // One thread of a warp reports, and only what lowers the word: an atomic of every thread would queue at the one
    // address. The ballot names all lanes, so that none may have returned before it.
    const unsigned reporters = __ballot_sync(0xffffffffu, bad);
    if (reporters != 0 && u.p.nonfinite && threadIdx.x % 32 == 0 && *u.p.nonfinite > index)
        atomicMin(reinterpret_cast<long long*>(u.p.nonfinite), static_cast<long long>(index));
}

// ---------------------------------------------------------------------------------------------------------------------
// launchers

template <bool kDeviance>
auto kernel_of(bool plain, bool wide) {
    return plain ? (wide ? update_kernel<true, true, kDeviance> : update_kernel<true, false, kDeviance>)
                 : (wide ? update_kernel<false, true, kDeviance> : update_kernel<false, false, kDeviance>);
}

int update_cuda(const UpdateParams& p, void* stream) {
    const UpdateLaunch u{p, Grid::of(p.batch, p.n, p.deviance ? kThreads : 1), is_wide_state(p)};
    if (u.grid.units == 0) return cudaSuccess;
    const bool plain = is_plain(p), wide = u.wide_state && has_wide_views(p);
    unsigned blocks;
    if (!cover(u.grid, plain ? kQuads<true> : kQuads<false>, blocks)) return cudaErrorInvalidConfiguration;
    const auto kernel = p.deviance ? kernel_of<true>(plain, wide) : kernel_of<false>(plain, wide);
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(u);
    return cudaGetLastError();
}

}  // namespace fastdiff
