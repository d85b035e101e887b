// One row of a plan: guidance, x0, clipping, the linear combinations, the noise and the next network input, in one
// pass.
#include <atomic>

#include "common/row.h"
#include "cpu/entry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {
namespace {

using F = Simd::F;

struct Update {
    const UpdateParams& p;
    Row row;
    int64_t index;
    bool whole;  // plain_vectors or state_vectors computes it
};

F load_at(const float* data, int64_t at, int count) {
    F result = {};
    memcpy(&result, data + at, count == W ? sizeof(F) : count * sizeof(float));
    return result;
}

void store_at(float* data, int64_t at, int count, F f) {
    memcpy(data + at, &f, count == W ? sizeof(F) : count * sizeof(float));
}

FASTDIFF_HD Simd::I not_finite(F f) { return (bit_cast<Simd::I>(f) & 0x7f800000) == 0x7f800000; }

// Elements e .. e + count - 1 of sample b; their deviances where they are asked for. Returns the lanes whose network
// output is not finite.
Simd::I update_vector(const Update& u, int64_t b, int64_t e, int count, F z, F known_z, float* deviance) {
    const UpdateParams& p = u.p;
    const Row& r = u.row;
    const int64_t at = b * p.n + e;
    Simd::I bad = {};
    Terms<F> t = {};
    t.x = load_at(p.x, at, count);
    t.z = z;
    if (p.n_outputs > 0) {
        t.m = load(p.outputs[0], b, e, count, p.n);
        if (p.n_outputs > 1) {
            t.m = t.m * r.w0 + load(p.outputs[1], b, e, count, p.n) * r.w1;
            if (p.n_outputs > 2) t.m = t.m + load(p.outputs[2], b, e, count, p.n) * r.w2;
        }
        bad = not_finite(t.m);
        if (p.gain) t.m = t.m * p.gain[b];
    }
    F clip = F{} + r.clip, scale = F{} + r.scale;
    if (p.clip) {
        clip = F{} + p.clip[2 * b];
        scale = F{} + p.clip[2 * b + 1];
    }
    t.x0 = predict_x0<Simd>(t.x, t.m, r.p, r.q, clip, scale);
    F log_sigma = {};
    if (p.variance.data && reads_z(r)) {
        log_sigma = learned_log_sigma<Simd>(load(p.variance, b, e, count, p.n), r.log_min, r.log_max);
        t.z = t.z * exp_in_range<Simd>(log_sigma);
    }
    if (deviance) store_at(deviance, 0, count, deviance_of<Simd>(z, log_sigma));
    if (reads_anchor(r)) t.anchor = load_at(p.anchor, at, count);
    if (reads_slot0(r)) t.slot0 = load_at(p.slots[static_cast<int>(r.read0)], at, count);
    if (reads_slot1(r)) t.slot1 = load_at(p.slots[static_cast<int>(r.read1)], at, count);
    if (reads_slot2(r)) t.slot2 = load_at(p.slots[static_cast<int>(r.read2)], at, count);
    if (reads_g(r)) t.g = load_at(p.gradient, at, count);
    F next = combine<Simd>(r.x, t);
    if (r.keeps_anchor != 0) store_at(p.anchor_out, at, count, combine<Simd>(r.anchor, t));
    if (r.write >= 0) store_at(p.slots_out[static_cast<int>(r.write)], at, count, combine<Simd>(r.slot, t));
    if (p.mask) {
        const F w = load_at(p.mask, at, count);
        const F known = load_at(p.known, at, count) * r.known_alpha + known_z * r.known_sigma;
        next = w * known + (1.0f - w) * next;
    }
    if (p.x_out) store_at(p.x_out, at, count, next);
    if (p.x0_out) store_at(p.x0_out, at, count, t.x0);
    if (p.model_input.data) store(p.model_input, b, e, count, p.n, next * r.next_c_in);
    return bad;
}

// The same for four whole vectors of rows that have one network output and no terms but x, x0, m and z, in contiguous
// memory: the case of DDPM and DDIM, several times as fast since every question is asked once for the four.
FASTDIFF_HD Simd::I plain_vectors(const UpdateParams& p, const Row& r, int64_t b, int64_t e, const F z[4]) {
    const int64_t at = b * p.n + e;
    F x[4], m[4], x0[4], next[4];
    Simd::I bad = {};
    for (int j = 0; j < 4; ++j) {
        x[j] = load_at(p.x, at + j * W, W);
        m[j] = load_dense(p.outputs[0], b * p.outputs[0].batch_stride + e + j * W);
        bad |= not_finite(m[j]);
        x0[j] = predict_x0<Simd>(x[j], m[j], r.p, r.q, F{} + r.clip, F{} + r.scale);
        next[j] = F{};
    }
    const auto add = [&](const F term[4], float coefficient) {
        if (coefficient != 0)
            for (int j = 0; j < 4; ++j) next[j] = next[j] + term[j] * coefficient;
    };
    add(x, r.x.x);
    add(x0, r.x.x0);
    add(m, r.x.m);
    add(z, r.x.z);
    if (p.x_out)
        for (int j = 0; j < 4; ++j) store_at(p.x_out, at + j * W, W, next[j]);
    if (p.x0_out)
        for (int j = 0; j < 4; ++j) store_at(p.x0_out, at + j * W, W, x0[j]);
    if (p.model_input.data)
        for (int j = 0; j < 4; ++j)
            store_dense(p.model_input, b * p.model_input.batch_stride + e + j * W, next[j] * r.next_c_in);
    return bad;
}

// The same for rows that also have an anchor, slots, or bounds for each sample.
FASTDIFF_HD Simd::I state_vectors(const UpdateParams& p, const Row& r, int64_t b, int64_t e, const F z[4]) {
    const int64_t at = b * p.n + e;
    const F clip = F{} + (p.clip ? p.clip[2 * b] : r.clip), scale = F{} + (p.clip ? p.clip[2 * b + 1] : r.scale);
    F x[4], m[4], x0[4], anchor[4], slots[3][4], sum[4];
    Simd::I bad = {};
    for (int j = 0; j < 4; ++j) {
        x[j] = load_at(p.x, at + j * W, W);
        m[j] = load_dense(p.outputs[0], b * p.outputs[0].batch_stride + e + j * W);
        bad |= not_finite(m[j]);
        x0[j] = predict_x0<Simd>(x[j], m[j], r.p, r.q, clip, scale);
        sum[j] = F{};
    }
    const auto read = [&](const float* data, F term[4]) {
        for (int j = 0; j < 4; ++j) term[j] = load_at(data, at + j * W, W);
    };
    const auto write = [&](float* data, const F value[4]) {
        for (int j = 0; j < 4; ++j) store_at(data, at + j * W, W, value[j]);
    };
    const auto add = [&](const F term[4], float coefficient) {
        if (coefficient != 0)
            for (int j = 0; j < 4; ++j) sum[j] = sum[j] + term[j] * coefficient;
    };
    const auto combined = [&](const Combination& c) {  // in the order of combine
        add(x, c.x);
        add(anchor, c.anchor);
        add(x0, c.x0);
        add(m, c.m);
        add(slots[0], c.slot0);
        add(slots[1], c.slot1);
        add(slots[2], c.slot2);
        add(z, c.z);
    };
    if (reads_anchor(r)) read(p.anchor, anchor);
    if (reads_slot0(r)) read(p.slots[static_cast<int>(r.read0)], slots[0]);
    if (reads_slot1(r)) read(p.slots[static_cast<int>(r.read1)], slots[1]);
    if (reads_slot2(r)) read(p.slots[static_cast<int>(r.read2)], slots[2]);
    const auto write_combined = [&](float* data, const Combination& c) {
        combined(c);
        write(data, sum);
        for (int j = 0; j < 4; ++j) sum[j] = F{};
    };
    if (r.keeps_anchor != 0) write_combined(p.anchor_out, r.anchor);
    if (r.write >= 0) write_combined(p.slots_out[static_cast<int>(r.write)], r.slot);
    combined(r.x);
    if (p.x_out) write(p.x_out, sum);
    if (p.x0_out) write(p.x0_out, x0);
    if (p.model_input.data)
        for (int j = 0; j < 4; ++j)
            store_dense(p.model_input, b * p.model_input.batch_stride + e + j * W, sum[j] * r.next_c_in);
    return bad;
}

bool takes_whole_vectors(const UpdateParams& p, const Row& r) {
    return p.n_outputs == 1 && !p.gain && !p.mask && !p.variance.data && !reads_g(r) && is_dense(p.outputs[0], p.n) &&
           (!p.model_input.data || is_dense(p.model_input, p.n));
}

bool is_plain(const UpdateParams& p, const Row& r) {
    return !p.clip && r.keeps_anchor == 0 && r.write < 0 && !reads_anchor(r) && !reads_slot0(r) && !reads_slot1(r) &&
           !reads_slot2(r);
}

// The sum over a block of which `count` elements are there. It is added up in place.
float deviance_sum(float* block, int64_t count) {
    int half = kDevianceBlock / 2;
    while (half > 1 && half >= count) half /= 2;  // these would add zeros
    std::fill(block + count, block + 2 * half, 0.0f);
    for (; half >= 2 * W; half /= 4)  // two levels at a time
        for (int i = 0; i < half / 2; i += W) {
            const F even = load_at(block, i, W) + load_at(block, i + half, W);
            const F odd = load_at(block, i + half / 2, W) + load_at(block, i + half / 2 + half, W);
            store_at(block, i, W, even + odd);
        }
    for (; half >= W; half /= 2)
        for (int i = 0; i < half; i += W) store_at(block, i, W, load_at(block, i, W) + load_at(block, i + half, W));
    for (; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) block[i] = block[i] + block[i + half];
    return block[0];
}

int64_t deviance_blocks(int64_t n) { return (n + kDevianceBlock - 1) / kDevianceBlock; }

// Compiled four times: in one function the many vectors of state_vectors would push those of plain rows out of
// registers. With deviance, the range begins and ends with a block.
template <bool plain, bool deviance>
void update_range(const void* context, int64_t begin, int64_t end) {
    const Update& u = *static_cast<const Update*>(context);
    const UpdateParams p = u.p;  // copies: the compiler knows that no store changes them
    const Row r = u.row;
    const bool whole = u.whole;
    const Simd::U quads = first_quads();
    const uint32_t draw = static_cast<uint32_t>(r.draw), stream = static_cast<uint32_t>(r.stream);
    const bool uses_z = reads_z(r), uses_known_z = p.mask && r.known_sigma != 0;
    const bool draws = uses_z && !p.noise, draws_known = uses_known_z && !p.known_noise;
    Simd::I bad = {};
    F z[kVectors] = {}, known_z[kVectors] = {};
    alignas(64) float block[deviance ? kDevianceBlock : 1];
    float* const sums = deviance ? p.deviance + u.index * p.batch * deviance_blocks(p.n) : nullptr;
    for (Cursor at(begin, p.n); at.group < end; at.advance()) {
        const int64_t b = at.b, first = at.first, in_block = first % kDevianceBlock;
        if (draws) normal_group(quads, first, sample_of(p.key, b), draw, stream, seed_of(p.key, b), z);
        if (draws_known)
            normal_group(quads, first, sample_of(p.key, b), draw, kKnownNoiseStream, seed_of(p.key, b), known_z);
        if (whole && first + kGroup <= p.n) {
            if (uses_z && p.noise)
                for (int j = 0; j < kVectors; ++j) z[j] = load_at(p.noise, b * p.n + first + j * W, W);
            if constexpr (deviance)
                for (int j = 0; j < kVectors; ++j) store_at(block, in_block + j * W, W, z[j] * z[j]);  // sigma is 1
            for (int j = 0; j < kVectors; j += 4) {
                if constexpr (plain)
                    bad |= plain_vectors(p, r, b, first + j * W, z + j);
                else
                    bad |= state_vectors(p, r, b, first + j * W, z + j);
            }
        } else {
            for (int j = 0; j < kVectors; ++j) {
                const int64_t e = first + j * W;
                if (e >= p.n) break;
                const int count = static_cast<int>(std::min<int64_t>(W, p.n - e));
                if (uses_z && p.noise) z[j] = load_at(p.noise, b * p.n + e, count);
                if (uses_known_z && p.known_noise) known_z[j] = load_at(p.known_noise, b * p.n + e, count);
                bad |= update_vector(u, b, e, count, z[j], known_z[j], deviance ? block + in_block + j * W : nullptr);
            }
        }
        if constexpr (deviance) {
            const int64_t begins = first - in_block, count = std::min<int64_t>(kDevianceBlock, p.n - begins);
            if (in_block + kGroup >= count)
                sums[b * deviance_blocks(p.n) + begins / kDevianceBlock] = deviance_sum(block, count);
        }
    }
    bool any = false;
    for (int i = 0; i < W; ++i) any |= bad[i] != 0;
    if (any && p.nonfinite) {
        int64_t seen = __atomic_load_n(p.nonfinite, __ATOMIC_RELAXED);
        while (u.index < seen &&
               !__atomic_compare_exchange_n(p.nonfinite, &seen, u.index, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    }
}

// The same in blocks of deviance, numbered through the batch.
template <bool plain>
void update_blocks(const void* context, int64_t begin, int64_t end) {
    const UpdateParams& p = static_cast<const Update*>(context)->p;
    const int64_t blocks = deviance_blocks(p.n);
    const auto first_group = [&](int64_t block) {
        return block / blocks * groups_in(p.n) + block % blocks * (kDevianceBlock / kGroup);
    };
    update_range<plain, true>(context, first_group(begin), first_group(end));
}

}  // namespace

void update(const UpdateParams& p, int threads) {
    const int64_t index = p.step ? *p.step : p.row;
    const Row& row = reinterpret_cast<const Row*>(p.table)[index];
    const Update u{p, row, index, takes_whole_vectors(p, row)};
    const int64_t grain = reads_z(row) && !p.noise ? kNoiseGrain : kCopyGrain;
    const bool plain = is_plain(p, row);
    if (p.deviance && reads_z(row))
        parallel_for(p.batch * deviance_blocks(p.n), grain / std::clamp<int64_t>(p.n, 1, kDevianceBlock), threads,
                     plain ? update_blocks<true> : update_blocks<false>, &u);
    else
        parallel_for(p.batch * groups_in(p.n), grain / kGroup, threads,
                     plain ? update_range<true, false> : update_range<false, false>, &u);
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
