// A thread's own memory, kept from call to call; each kernel's file has its own.
#pragma once

#include <stdint.h>

#include <memory>

namespace fastdiff {
namespace FASTDIFF_SIMD {
namespace {

float* scratch(size_t floats) {
    constexpr size_t kLine = 64;  // bytes of a cache line
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local size_t size = 0;
    if (size < floats) {
        memory.reset();
        size = 0;
        memory.reset(new char[floats * 4 + kLine]);
        size = floats;
    }
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + kLine - 1) / kLine * kLine);
}

}  // namespace
}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
