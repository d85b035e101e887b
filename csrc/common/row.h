// One row of a plan and the arithmetic it asks for. fastdiff/plan/row.py has the formula, plan.py the columns' names,
// which a test compares with those here. The order of operations is fixed, so that every backend gives the same bits.
#pragma once

#include "common/lane.h"

namespace fastdiff {

// Coefficients of a linear combination, in the order in which the terms are added. A zero coefficient skips its term.
struct Combination {
    float x, anchor, x0, m, slot0, slot1, slot2, z, g;
};

// A row as it lies in the float32 table, 48 floats. Small integers are stored as floats, exactly.
struct Row {
    float t;                         // the timestep; kernels do not read it
    float next_c_in;                 // scale of the network's next input
    float w0, w1, w2;                // guidance: m = w0 o0 + w1 o1 + w2 o2 where there are several outputs
    float p, q;                      // x0 = p x + q m
    float clip, scale;               // x0 <- scale * clamp(x0, -clip, clip)
    Combination x, anchor, slot;     // x', anchor' and the slot that is written
    float read0, read1, read2;       // numbers of the slots read, -1 for none
    float write;                     // number of the slot written, -1 for none
    float keeps_anchor;              // 1: anchor' is written
    float log_min, log_max;          // learned variance: logarithms of its two ends
    float known_alpha, known_sigma;  // the known image's level after this row
    float draw, stream;              // the noise's address
    float calls_model;               // 0: a change of state without a network call
};
static_assert(sizeof(Row) == 48 * sizeof(float), "the table has 48 columns");

FASTDIFF_HD bool reads_x0(const Row& r) {
    return r.x.x0 != 0 || (r.keeps_anchor != 0 && r.anchor.x0 != 0) || (r.write >= 0 && r.slot.x0 != 0);
}
#define FASTDIFF_READS(name)                                                                                       \
    FASTDIFF_HD bool reads_##name(const Row& r) {                                                                  \
        return r.x.name != 0 || (r.keeps_anchor != 0 && r.anchor.name != 0) || (r.write >= 0 && r.slot.name != 0); \
    }
FASTDIFF_READS(anchor)
FASTDIFF_READS(slot0)
FASTDIFF_READS(slot1)
FASTDIFF_READS(slot2)
FASTDIFF_READS(z)
FASTDIFF_READS(g)
#undef FASTDIFF_READS

template <class F>
struct Terms {
    F x, anchor, x0, m, slot0, slot1, slot2, z, g;
};

template <class L>
FASTDIFF_HD typename L::F combine(const Combination& c, const Terms<typename L::F>& t) {
    typename L::F sum = L::splat(0.0f);
#define FASTDIFF_TERM(name) \
    if (c.name != 0) sum = sum + t.name * c.name;
    FASTDIFF_TERM(x)
    FASTDIFF_TERM(anchor)
    FASTDIFF_TERM(x0)
    FASTDIFF_TERM(m)
    FASTDIFF_TERM(slot0)
    FASTDIFF_TERM(slot1)
    FASTDIFF_TERM(slot2)
    FASTDIFF_TERM(z)
    FASTDIFF_TERM(g)
#undef FASTDIFF_TERM
    return sum;
}

// x0 = p x + q m, clamped to +-clip and scaled. NaN passes through.
template <class L>
FASTDIFF_HD typename L::F predict_x0(typename L::F x, typename L::F m, float p, float q, typename L::F clip,
                                     typename L::F scale) {
    using F = typename L::F;
    F x0 = x * p + m * q;
    x0 = L::select(L::is_less(clip, x0), clip, x0);
    x0 = L::select(L::is_less(x0, -clip), -clip, x0);
    return x0 * scale;
}

// exp(y) for |y| <= 87, relative error 1e-7; NaN passes through. Exact operations only, as in normal.h.
template <class L>
FASTDIFF_HD typename L::F exp_in_range(typename L::F y) {
    using F = typename L::F;
    using I = typename L::I;
    const F shifted = y * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded exponent
    const F k = shifted - 12582912.0f;
    const F r = (y - k * 0.693359375f) - k * -2.12194440e-4f;
    F e = r * 1.9875691500e-4f + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * (r * r) + r + 1.0f;
    return e * bit_cast<F>((bit_cast<I>(shifted) << 23) + 0x3f800000);
}

// ln sigma under learned variance: half the interpolated logarithm (Nichol & Dhariwal 2021, Equation 15), clamped to
// +-87, beyond which float32 does not hold sigma.
template <class L>
FASTDIFF_HD typename L::F learned_log_sigma(typename L::F v, float log_min, float log_max) {
    using F = typename L::F;
    const F f = (v + 1.0f) * 0.5f, top = L::splat(87.0f);
    F y = (f * log_max + (1.0f - f) * log_min) * 0.5f;
    y = L::select(L::is_less(top, y), top, y);
    return L::select(L::is_less(y, -top), -top, y);
}

// What one element's draw adds to the deviance, -2 ln p(x' | x) less what a row's every element adds: z^2 + ln sigma^2,
// for z before it is multiplied by sigma. A block's sum is a tree: element i takes i + 512's, then i + 256's, ... and
// at last element 0 takes 1's, those beyond the sample's end counting as 0. So it has the same bits however the
// elements were distributed to lanes and threads.
template <class L>
FASTDIFF_HD typename L::F deviance_of(typename L::F z, typename L::F log_sigma) {
    return z * z + (log_sigma + log_sigma);
}

}  // namespace fastdiff
