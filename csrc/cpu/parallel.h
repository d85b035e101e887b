// parallel_for: work distributed in chunks to the calling thread and torch's own team, or a pool of ours. See
// parallel.cpp.
#pragma once

#include <stdint.h>

namespace fastdiff {

// The least elements that are worth a thread of their own, where each draws a normal and where none does: some 8
// microseconds of work, since an awake team takes 2 to 3 to begin and end.
constexpr int64_t kNoiseGrain = 16384, kCopyGrain = 65536;

using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);

// Calls function(context, begin, end) over disjoint ranges that cover [0, units), on at most `threads` threads, the
// caller's among them. Safe to call from several threads at once and in a forked child.
void parallel_for(int64_t units, int64_t grain, int threads, RangeFunction function, const void* context);

}  // namespace fastdiff
