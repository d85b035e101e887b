// parallel_for: work dealt in chunks to the calling thread and a small pool of sleeping helpers. See parallel.cpp.
#pragma once

#include <stdint.h>

namespace fastdiff {

// The least elements that are worth a thread of their own, where each draws a normal and where none does: some 65 and
// 80 microseconds of work, since a helper takes 30 to 60 to wake.
constexpr int64_t kNoiseGrain = 65536, kCopyGrain = 262144;

using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);

// Calls function(context, begin, end) over disjoint ranges that cover [0, units), on at most `threads` threads, the
// caller's among them. Safe to call from several threads at once and in a forked child.
void parallel_for(int64_t units, int64_t grain, int threads, RangeFunction function, const void* context);

}  // namespace fastdiff
