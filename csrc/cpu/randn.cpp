// out[b, e] = the normal at (seed, sample, draw, stream, e).
#include "cpu/entry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {

static void randn_range(const void* context, int64_t begin, int64_t end) {
    const RandnParams p = *static_cast<const RandnParams*>(context);  // a copy: no store changes it
    const Simd::U quads = first_quads();
    const bool dense = is_dense(p.out, p.n);
    for (Cursor at(begin, p.n); at.group < end; at.advance()) {
        const int64_t b = at.b, first = at.first;
        Simd::F z[kVectors];
        normal_group(quads, first, sample_of(p.key, b), p.draw, p.stream, seed_of(p.key, b), z);
        if (dense && first + kGroup <= p.n) {
            for (int j = 0; j < kVectors; ++j) store_dense(p.out, b * p.out.batch_stride + first + j * W, z[j]);
            continue;
        }
        for (int j = 0; j < kVectors; ++j) {
            const int64_t e = first + j * W;
            if (e < p.n) store(p.out, b, e, static_cast<int>(std::min<int64_t>(W, p.n - e)), p.n, z[j]);
        }
    }
}

void randn(const RandnParams& params, int threads) {
    parallel_for(params.batch * groups_in(params.n), kNoiseGrain / kGroup, threads, randn_range, &params);
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
