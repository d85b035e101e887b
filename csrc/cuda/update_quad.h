// What a thread of update.cu does with a quad: first it loads what every row reads, then, once the row is at hand, it
// loads what that row asks for and finishes. csrc/cpu/update.cpp does the same over vectors.
#pragma once

#include "common/row.h"
#include "cuda/noise_quad.h"

namespace fastdiff {

struct UpdateLaunch {
    UpdateParams p;
    Grid grid;
    bool wide_state;  // whether the float32 tensors are read and written 16 bytes at a time
};

// A launch is plain if no tensor is given but x, one network output and the noise, so that no row of its table can ask
// for more: the case of DDPM, DDIM and Euler. This is known without a look at the table.
inline bool is_plain(const UpdateParams& p) {
    if (p.n_outputs != 1 || p.variance.data || p.anchor || p.anchor_out || p.gain || p.clip || p.gradient || p.mask)
        return false;
    for (int slot = 0; slot < 4; ++slot)
        if (p.slots[slot] || p.slots_out[slot]) return false;
    return true;
}

inline bool is_wide_state(const UpdateParams& p) {
    const void* tensors[] = {p.x,     p.anchor,      p.noise, p.gradient,   p.mask,
                             p.known, p.known_noise, p.x_out, p.anchor_out, p.x0_out};
    bool wide = true;
    for (const void* data : tensors) wide = wide && is_wide(data, p.n);
    for (int slot = 0; slot < 4; ++slot) wide = wide && is_wide(p.slots[slot], p.n) && is_wide(p.slots_out[slot], p.n);
    return wide;
}

inline bool has_wide_views(const UpdateParams& p) {
    bool wide = is_wide(p.variance, p.n) && is_wide(p.model_input, p.n);
    for (int i = 0; i < p.n_outputs; ++i) wide = wide && is_wide(p.outputs[i], p.n);
    return wide;
}

template <bool kPlain>
constexpr int kOutputs = kPlain ? 1 : 3;

template <bool kPlain>
struct UpdateInputs {
    Quad at;
    Float4 x, outputs[kOutputs<kPlain>];  // the outputs raw
};

// kWide promises wide_state and has_wide_views; with kDeviance a quad may lie beyond the sample.
template <bool kPlain, bool kWide, bool kDeviance>
FASTDIFF_HD void load_update(const UpdateLaunch& u, int64_t unit, UpdateInputs<kPlain>& in) {
    const UpdateParams& p = u.p;
    in.at = locate(u.grid, unit);
    if (kDeviance && in.at.count <= 0) return;
    in.x = load4(p.x, kWide || u.wide_state, in.at);
    FASTDIFF_UNROLL
    for (int i = 0; i < kOutputs<kPlain>; ++i)
        in.outputs[i] = kPlain || i < p.n_outputs ? load_raw4<kWide>(p.outputs[i], in.at, p.n) : Float4{};
}

// Returns whether a network output is not finite. kDeviance: writes the elements' deviances, 0 beyond the sample.
template <bool kPlain, bool kWide, bool kDeviance>
FASTDIFF_HD bool finish_update(const UpdateLaunch& u, const Row& r, const UpdateInputs<kPlain>& in, Float4& deviance) {
    const UpdateParams& p = u.p;
    const Quad& at = in.at;
    if (kDeviance) {
        deviance = {};
        if (at.count <= 0) return false;
    }
    const bool wide = kWide || u.wide_state;
    Terms<Float4> t = {};
    t.x = in.x;
    Float4 variance = {};
    const bool uses_z = kPlain ? r.x.z != 0 : reads_z(r);
    const bool uses_variance = !kPlain && p.variance.data && uses_z;
    if (!kPlain) {
        if (reads_anchor(r)) t.anchor = load4(p.anchor, wide, at);
        if (reads_slot0(r)) t.slot0 = load4(p.slots[static_cast<int>(r.read0)], wide, at);
        if (reads_slot1(r)) t.slot1 = load4(p.slots[static_cast<int>(r.read1)], wide, at);
        if (reads_slot2(r)) t.slot2 = load4(p.slots[static_cast<int>(r.read2)], wide, at);
        if (reads_g(r)) t.g = load4(p.gradient, wide, at);
        if (uses_variance) variance = load_raw4<kWide>(p.variance, at, p.n);
    }
    if (uses_z)
        t.z = p.noise ? load4(p.noise, wide, at)
                      : draw4(p.key, static_cast<uint32_t>(r.draw), static_cast<uint32_t>(r.stream), at);

    t.m = widen(in.outputs[0], p.outputs[0].dtype);
    float clip = r.clip, scale = r.scale;
    if (!kPlain && p.clip) {
        clip = p.clip[2 * at.b];
        scale = p.clip[2 * at.b + 1];
    }
    if (!kPlain && p.n_outputs > 1) {
        t.m = t.m * r.w0 + widen(in.outputs[1], p.outputs[1].dtype) * r.w1;
        if (p.n_outputs > 2) t.m = t.m + widen(in.outputs[2], p.outputs[2].dtype) * r.w2;
    }
    bool bad = false;
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i) bad |= !(fabsf(t.m.v[i]) < INFINITY);  // of NaN, too, every comparison is false
    if (!kPlain && p.n_outputs > 0 && p.gain) t.m = t.m * p.gain[at.b];
    if (p.x0_out || (kPlain ? r.x.x0 != 0 : reads_x0(r))) {
        FASTDIFF_UNROLL
        for (int i = 0; i < 4; ++i) t.x0.v[i] = predict_x0<Scalar>(t.x.v[i], t.m.v[i], r.p, r.q, clip, scale);
    }
    if (kDeviance) {
        FASTDIFF_UNROLL
        for (int i = 0; i < 4; ++i)
            if (i < at.count) deviance.v[i] = deviance_of<Scalar>(t.z.v[i], 0.0f);
    }
    if (uses_variance) {
        variance = widen(variance, p.variance.dtype);
        FASTDIFF_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float log_sigma = learned_log_sigma<Scalar>(variance.v[i], r.log_min, r.log_max);
            if (kDeviance && i < at.count) deviance.v[i] = deviance_of<Scalar>(t.z.v[i], log_sigma);
            t.z.v[i] *= exp_in_range<Scalar>(log_sigma);
        }
    }

    Combination c = r.x;
    if (kPlain) c.anchor = c.slot0 = c.slot1 = c.slot2 = c.g = 0;  // known here, so that their tests vanish
    Float4 next = combine<Four>(c, t);
    if (!kPlain) {
        if (r.keeps_anchor != 0) store4(p.anchor_out, wide, at, combine<Four>(r.anchor, t));
        if (r.write >= 0) store4(p.slots_out[static_cast<int>(r.write)], wide, at, combine<Four>(r.slot, t));
        if (p.mask) {
            // Read only now: held from the start, these twelve registers would cost every other row occupancy.
            const Float4 w = load4(p.mask, wide, at), image = load4(p.known, wide, at);
            Float4 known_z = {};
            if (r.known_sigma != 0)
                known_z = p.known_noise ? load4(p.known_noise, wide, at)
                                        : draw4(p.key, static_cast<uint32_t>(r.draw), kKnownNoiseStream, at);
            const Float4 known = image * r.known_alpha + known_z * r.known_sigma;
            FASTDIFF_UNROLL
            for (int i = 0; i < 4; ++i) next.v[i] = w.v[i] * known.v[i] + (1.0f - w.v[i]) * next.v[i];
        }
    }
    if (p.x_out) store4(p.x_out, wide, at, next);
    if (p.x0_out) store4(p.x0_out, wide, at, t.x0);
    if (p.model_input.data) store4<kWide>(p.model_input, at, p.n, next * r.next_c_in);
    return bad;
}

}  // namespace fastdiff
