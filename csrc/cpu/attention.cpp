// softmax(scale q k^T) v in one pass over the keys (Milakov & Gimelshein 2018; Dao et al. 2022): no score is kept.
//
// The lanes of a vector are queries. A tile's queries are transposed once; a score is then a sum of a key's numbers,
// each one for all lanes, times the queries' vectors, and a result a sum of a value's numbers times the weights'
// vectors. So heads of 10 or 40 channels leave no lane empty, and maxima and sums need nothing of another lane. A
// head's keys and values are copied once, in float32 and side by side. A block's keys are summed by themselves and then
// added: a result's bits depend on its own query, and on neither the tile nor the threads.
#include <atomic>
#include <utility>

#include "cpu/entry.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/silu.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {
namespace {

using F = Simd::F;
using Params = AttentionParams;

constexpr int kVectorsOfTile = W >= 16 ? 4 : 3;
// Rows that are multiplied at once: their sums fill the 32 registers of AVX-512, or 16, but for those of the operands.
constexpr int kRows = W >= 16 ? 6 : 4;
constexpr int64_t kKeys = 64;  // of a block

FASTDIFF_HD F load_floats(const float* at) {
    F result;
    memcpy(&result, at, sizeof(result));
    return result;
}

FASTDIFF_HD void store_floats(float* at, F f) { memcpy(at, &f, sizeof(f)); }

// out[r] = sum over i of a[r row + i step] b[i], plus factor times what out was, if there is a factor. b and out are
// rows of T vectors.
template <int R, int T>
__attribute__((noinline)) void multiply(const float* a, int64_t row, int64_t step, const float* b, int64_t n,
                                        const F* factor, float* out) {
    F sums[R][T];
    const float* rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        rows[r] = a + r * row;
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) sums[r][t] = F{};
    }
    for (int64_t i = 0, at = 0; i < n; ++i, at += step, b += T * W) {
        F vectors[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) vectors[t] = load_floats(b + t * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F number = Simd::splat(rows[r][at]);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) sums[r][t] = fma(number, vectors[t], sums[r][t]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            float* const to = out + (r * T + t) * W;
            store_floats(to, factor ? fma(load_floats(to), factor[t], sums[r][t]) : sums[r][t]);
        }
}

template <int T, int... R>
void multiply_rows(int64_t count, const float* a, int64_t row, int64_t step, const float* b, int64_t n, const F* factor,
                   float* out, std::integer_sequence<int, R...>) {
    static constexpr decltype(&multiply<1, T>) of_rows[] = {multiply<R + 1, T>...};
    const int64_t parts = (count + kRows - 1) / kRows, size = (count + parts - 1) / parts;  // alike, not 8 and 2
    for (int64_t r = 0; r < count; r += size)
        of_rows[std::min(size, count - r) - 1](a + r * row, row, step, b, n, factor, out + r * T * W);
}

// A tile's queries, [channels, T W], to its results in the same place. keys, values: rows of `width`. scores: room for
// kKeys rows, sums: for channels.
template <int T, bool kRough>
void attend(const Params& p, const float* keys, const float* values, int64_t width, float* q, float* scores,
            float* sums) {
    constexpr auto counts = std::make_integer_sequence<int, kRows>();
    F most[T], total[T], factor[T], one[T];
    for (int t = 0; t < T; ++t) most[t] = F{} - __builtin_inff(), total[t] = F{}, one[t] = F{} + 1.0f;
    for (int64_t first = 0; first < p.keys; first += kKeys) {
        const int64_t n = std::min(kKeys, p.keys - first);
        for (int64_t c = 0; c < p.channels; c += kKeys)
            multiply_rows<T>(n, keys + first * width + c, width, 1, q + c * T * W, std::min(kKeys, p.channels - c),
                             c ? one : nullptr, scores, counts);
        F top[T], part[T];
        for (int t = 0; t < T; ++t) top[t] = most[t], part[t] = F{};
        for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const F score = load_floats(scores + (j * T + t) * W);
                top[t] = top[t] < score ? score : top[t];
            }
        for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                float* const at = scores + (j * T + t) * W;
                const F weight = exp2<kRough, true>(load_floats(at) - top[t]);
                store_floats(at, weight);
                part[t] = part[t] + weight;
            }
        for (int t = 0; t < T; ++t) {
            factor[t] = most[t] < top[t] ? exp2<false, true>(most[t] - top[t]) : F{} + 1.0f;
            total[t] = fma(total[t], factor[t], part[t]);
            most[t] = top[t];
        }
        multiply_rows<T>(p.channels, values + first * width, 1, width, scores, n, first ? factor : nullptr, sums,
                         counts);
    }
    for (int t = 0; t < T; ++t) total[t] = 1.0f / total[t];
    for (int64_t c = 0; c < p.channels; ++c)
        for (int t = 0; t < T; ++t) {
            const int64_t at = (c * T + t) * W;
            store_floats(q + at, load_floats(sums + at) * total[t]);
        }
}

// Lane l of the result: lane from[l] of a, or from[l] - W of b.
FASTDIFF_HD F shuffled(F a, F b, Simd::I from) {
#if defined(__clang__)  // which has no such builtin
    F result = a;
    for (int l = 0; l < W; ++l) result[l] = from[l] < W ? a[from[l]] : b[from[l] - W];
    return result;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

// A square of W rows, turned: row i becomes what column i was (Eklundh 1972).
template <int kStep = 1>
FASTDIFF_HD void turn(F rows[W]) {
    Simd::I low, high;
    for (int l = 0; l < W; ++l) low[l] = l & kStep ? W + l - kStep : l, high[l] = l & kStep ? W + l : l + kStep;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        if (i & kStep) continue;
        const F a = rows[i], b = rows[i + kStep];
        rows[i] = shuffled(a, b, low), rows[i + kStep] = shuffled(a, b, high);
    }
    if constexpr (2 * kStep < W) turn<2 * kStep>(rows);
}

// The rows of one head: sample r of the view, whose elements are channels, is row r.
View rows_of(const Params& p, const Heads& heads, int64_t b, int64_t h) {
    const int64_t bytes = (b * heads.batch_stride + h * heads.head_stride) * (p.dtype == kFloat32 ? 4 : 2);
    return {static_cast<char*>(heads.data) + bytes, p.dtype, heads.row_stride, p.channels, 0, 1};
}

// A head's keys or values as float32 in `room`, as rows of `width`.
void copy_rows(const Params& p, const View& rows, int64_t width, float* room) {
    for (int64_t r = 0; r < p.keys; ++r, room += width) {
        const int64_t at = r * rows.batch_stride;
        int64_t c = 0;
        for (; c + W <= p.channels; c += W) store_floats(room + c, load_dense(rows, at + c));
        for (; c < p.channels; ++c) room[c] = load_one(rows, at + c);
    }
}

// A tile's queries times `scale` to q, [channels, width], or its results from there: a square of lanes and channels at
// a time, and one by one the channels that fill none.
template <bool kIn>
void move_tile(const Params& p, View rows, int64_t first, int64_t count, float scale, float* q, int64_t width) {
    const int64_t whole = p.channels / W * W;
    for (int64_t lane = 0; lane < width; lane += W) {
        const int64_t at = (first + lane) * rows.batch_stride, there = std::min<int64_t>(W, count - lane);
        float* const to = q + lane;
        for (int64_t c = 0; c < whole; c += W) {
            F square[W] = {};
            for (int i = 0; i < (kIn ? there : W); ++i)
                square[i] =
                    kIn ? load_dense(rows, at + i * rows.batch_stride + c) * scale : load_floats(to + (c + i) * width);
            turn(square);
            for (int i = 0; i < (kIn ? W : there); ++i)
                if (kIn)
                    store_floats(to + (c + i) * width, square[i]);
                else
                    store_dense(rows, at + i * rows.batch_stride + c, square[i]);
        }
        for (int64_t c = whole; c < p.channels; ++c)
            for (int i = 0; i < (kIn ? W : there); ++i)
                if (kIn)
                    to[c * width + i] = i < there ? load_one(rows, at + i * rows.batch_stride + c) * scale : 0.0f;
                else
                    store_one(rows, at + i * rows.batch_stride + c, to[c * width + i]);
    }
}

struct Work {
    Params p;
    uint64_t call;  // differs from call to call
    int64_t tiles;  // of a head
};

// The head whose keys and values this thread's scratch holds in float32.
thread_local uint64_t held_call = 0;
thread_local int64_t held_head = 0;

template <bool kRough>
void range(const void* context, int64_t first_unit, int64_t last_unit) {
    constexpr int64_t lanes = kVectorsOfTile * W;
    const Work& work = *static_cast<const Work*>(context);
    const Params& p = work.p;
    // Rows a multiple of 1 KiB apart would keep a block of them from the first cache.
    const int64_t width = p.channels + (p.channels % 256 ? 0 : W), room = p.keys * width;
    float* const q = scratch((2 * p.channels + kKeys) * lanes + 2 * room);
    float* const sums = q + p.channels * lanes;
    float* const scores = sums + p.channels * lanes;
    float* const keys = scores + kKeys * lanes;
    float* const values = keys + room;
    const float scale = p.scale * 1.4426950408889634f;  // log2 e: weights are powers of two
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
        const int64_t head = unit / work.tiles, b = head / p.heads, h = head % p.heads;
        if (held_call != work.call || held_head != head) {
            copy_rows(p, rows_of(p, p.k, b, h), width, keys);
            copy_rows(p, rows_of(p, p.v, b, h), width, values);
            held_call = work.call, held_head = head;
        }
        const int64_t first = unit % work.tiles * lanes, count = std::min(lanes, p.queries - first);
        const int64_t vectors = (count + W - 1) / W;
        move_tile<true>(p, rows_of(p, p.q, b, h), first, count, scale, q, vectors * W);
        (vectors == 4   ? attend<4, kRough>
         : vectors == 3 ? attend<3, kRough>
         : vectors == 2 ? attend<2, kRough>
                        : attend<1, kRough>)(p, keys, values, width, q, scores, sums);
        move_tile<false>(p, rows_of(p, p.out, b, h), first, count, 1, q, vectors * W);
    }
}

}  // namespace

void attention(const AttentionParams& params, int threads) {
    const Params& p = params;
    constexpr int64_t lanes = kVectorsOfTile * W;
    static std::atomic<uint64_t> calls{0};
    const Work work{p, ++calls, (p.queries + lanes - 1) / lanes};
    parallel_for(p.batch * p.heads * work.tiles, 1, threads, p.dtype == kBFloat16 ? range<true> : range<false>, &work);
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
