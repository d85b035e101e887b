// out = sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) z, with z given or drawn.
#include <limits>

#include "cpu/entry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {

static void add_noise_range(const void* context, int64_t begin, int64_t end) {
    const AddNoiseParams p = *static_cast<const AddNoiseParams*>(context);  // a copy: no store changes it
    const Simd::U quads = first_quads();
    const bool dense = is_dense(p.x0, p.n) && is_dense(p.out, p.n) && (!p.noise.data || is_dense(p.noise, p.n)) &&
                       (!p.noise_out.data || is_dense(p.noise_out, p.n));
    for (Cursor at(begin, p.n); at.group < end; at.advance()) {
        const int64_t b = at.b, first = at.first;
        const int64_t t = p.timesteps ? p.timesteps[b] : p.timestep;
        const bool known = t >= 0 && t < p.T;
        const float nan = std::numeric_limits<float>::quiet_NaN();
        const float alpha = known ? p.coefficients[2 * t] : nan, sigma = known ? p.coefficients[2 * t + 1] : nan;
        Simd::F z[kVectors];
        if (p.noise.data == nullptr) {
            normal_group(quads, first, sample_of(p.key, b), p.draw, p.stream, seed_of(p.key, b), z);
        }
        if (dense && first + kGroup <= p.n) {
            for (int j = 0; j < kVectors; ++j) {
                const int64_t e = first + j * W;
                if (p.noise.data) z[j] = load_dense(p.noise, b * p.noise.batch_stride + e);
                const Simd::F x0 = load_dense(p.x0, b * p.x0.batch_stride + e);
                store_dense(p.out, b * p.out.batch_stride + e, x0 * alpha + z[j] * sigma);
                if (p.noise_out.data) store_dense(p.noise_out, b * p.noise_out.batch_stride + e, z[j]);
            }
            continue;
        }
        for (int j = 0; j < kVectors; ++j) {
            const int64_t e = first + j * W;
            if (e >= p.n) break;
            const int count = static_cast<int>(std::min<int64_t>(W, p.n - e));
            if (p.noise.data) z[j] = load(p.noise, b, e, count, p.n);
            store(p.out, b, e, count, p.n, load(p.x0, b, e, count, p.n) * alpha + z[j] * sigma);
            if (p.noise_out.data) store(p.noise_out, b, e, count, p.n, z[j]);
        }
    }
}

void add_noise(const AddNoiseParams& params, int threads) {
    parallel_for(params.batch * groups_in(params.n), (params.noise.data ? kCopyGrain : kNoiseGrain) / kGroup, threads,
                 add_noise_range, &params);
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
