// The kernels of one vector width, as dispatch.cpp calls them.
#pragma once

#include "fastdiff.h"

namespace fastdiff {

#define FASTDIFF_KERNEL(op, Params) void op(const Params& params, int threads);
namespace portable {
FASTDIFF_OPERATIONS(FASTDIFF_KERNEL)
}
namespace avx2 {
FASTDIFF_OPERATIONS(FASTDIFF_KERNEL)
}
namespace avx512 {
FASTDIFF_OPERATIONS(FASTDIFF_KERNEL)
}
#undef FASTDIFF_KERNEL

}  // namespace fastdiff
