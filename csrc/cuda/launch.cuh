// What the launchers share: the block's size, and how many blocks cover a grid of quads.
#pragma once

#include <cuda_runtime.h>  // cudaStream_t, cudaError_t, cudaGetLastError

#include "cuda/quad.h"

namespace fastdiff {

// Of a block. update.cu needs at least 48: there each column of a row is fetched by one thread.
constexpr int kThreads = 256;

// Blocks of kThreads threads with quads_per_thread quads each; false where there are more than a launch may have.
inline bool cover(const Grid& grid, int quads_per_thread, unsigned& blocks) {
    const int64_t per_block = int64_t{kThreads} * quads_per_thread;
    const int64_t wanted = (grid.units + per_block - 1) / per_block;
    blocks = static_cast<unsigned>(wanted);
    return wanted <= INT32_MAX;
}

}  // namespace fastdiff
