// Enough of CUDA to compile a .cu file for the CPU and run it faithfully: blocks one after another, a block's threads
// as fibers that stop where CUDA's threads wait for each other. Threads start forwards or backwards (reverse_threads),
// and memory that one writes for others is not what they read where a barrier is missing: the results differ.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

enum class Waits { kNot, kWarp, kBlock, kDone };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    Waits waits = Waits::kNot;
    int exchanges = 0;
    uint32_t given[2];  // to a shuffle, and to the next: a lane may be one ahead of another
};

inline bool reverse_threads = false;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline Fiber& self() { return fibers[threadIdx.x]; }

inline void wait(Waits what) {
    self().waits = what;
    swapcontext(&self().context, &scheduler);
}

inline void fiber_main() {
    body();
    wait(Waits::kDone);
}

// Lets the lanes from begin to end go on if all wait for the same, of this kind.
inline bool release(size_t begin, size_t end, Waits kind) {
    for (size_t i = begin; i < end; ++i)
        if (fibers[i].waits != kind) return false;
    for (size_t i = begin; i < end; ++i) fibers[i].waits = Waits::kNot;
    return true;
}

inline void run_block(size_t threads) {
    if (fibers.size() < threads) fibers.resize(threads);
    for (size_t i = 0; i < threads; ++i) {
        Fiber& f = fibers[i];
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        f.waits = Waits::kNot;
        f.exchanges = 0;
        makecontext(&f.context, fiber_main, 0);
    }
    while (true) {
        bool moved = false, done = true;
        for (size_t k = 0; k < threads; ++k) {
            const size_t i = reverse_threads ? threads - 1 - k : k;
            if (fibers[i].waits != Waits::kNot) continue;
            threadIdx.x = static_cast<unsigned>(i);
            swapcontext(&scheduler, &fibers[i].context);
            moved = true;
        }
        for (size_t i = 0; i < threads; ++i) done &= fibers[i].waits == Waits::kDone;
        if (done) return;
        for (size_t i = 0; i < threads; i += 32) moved |= release(i, i + 32, Waits::kWarp);
        moved |= release(0, threads, Waits::kBlock);
        if (!moved) {
            fprintf(stderr, "threads wait for others that will not come\n");
            abort();
        }
    }
}

template <class T>
T shuffle(T value, int source) {
    static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
    const int turn = self().exchanges++ % 2;
    memcpy(&self().given[turn], &value, 4);
    wait(Waits::kWarp);
    memcpy(&value, &fibers[threadIdx.x / 32 * 32 + source].given[turn], 4);
    return value;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::Waits::kBlock); }

// All lanes take part.
template <class T>
T __shfl_sync(unsigned, T value, int source) {
    return cuda_on_cpu::shuffle(value, source % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return cuda_on_cpu::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
    const int source = static_cast<int>(threadIdx.x % 32) + delta;
    return cuda_on_cpu::shuffle(value, source < 32 ? source : static_cast<int>(threadIdx.x % 32));
}

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

template <class Parameter>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameter), const Parameter& argument) {
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    cuda_on_cpu::body = [&] { kernel(argument); };
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) cuda_on_cpu::run_block(blockDim.x);
    return cudaSuccess;
}
