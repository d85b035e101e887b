// What a thread of randn.cu and add_noise.cu does with its quad.
#pragma once

#include "common/normal.h"
#include "cuda/quad.h"

namespace fastdiff {

// The quad's four normals.
FASTDIFF_HD Float4 draw4(const NoiseKey& key, uint32_t draw, uint32_t stream, const Quad& at) {
    Float4 z;
    normal4<Scalar>(static_cast<uint32_t>(at.e / 4), sample_of(key, at.b), draw, stream, seed_of(key, at.b), z.v);
    return z;
}

template <bool kWide>
FASTDIFF_HD void randn_quad(const RandnParams& p, const Quad& at) {
    store4<kWide>(p.out, at, p.n, draw4(p.key, p.draw, p.stream, at));
}

inline bool has_wide_views(const AddNoiseParams& p) {
    return is_wide(p.x0, p.n) && is_wide(p.noise, p.n) && is_wide(p.out, p.n) && is_wide(p.noise_out, p.n);
}

template <bool kWide>
FASTDIFF_HD void add_noise_quad(const AddNoiseParams& p, const Quad& at) {
    // x0 is on its way while the timestep, and then its coefficients, are read. A timestep outside the table gives NaN:
    // an exception would need a result that the host waits for.
    const Float4 raw = load_raw4<kWide>(p.x0, at, p.n);
    const int64_t t = p.timesteps ? p.timesteps[at.b] : p.timestep;
    const bool known = t >= 0 && t < p.T;
    const float nan = bit_cast<float>(0x7fc00000u);
    const float alpha = known ? p.coefficients[2 * t] : nan, sigma = known ? p.coefficients[2 * t + 1] : nan;
    const Float4 z = p.noise.data ? load4<kWide>(p.noise, at, p.n) : draw4(p.key, p.draw, p.stream, at);
    store4<kWide>(p.out, at, p.n, widen(raw, p.x0.dtype) * alpha + z * sigma);
    if (p.noise_out.data) store4<kWide>(p.noise_out, at, p.n, z);
}

}  // namespace fastdiff
