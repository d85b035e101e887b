// softmax(scale q k^T) v in one pass over the keys (Milakov & Gimelshein 2018; Dao et al. 2022): no score is kept.
//
// The lanes of a vector are queries. A tile's queries are transposed once; a score is then a sum of a key's numbers,
// each one for all lanes, times the queries' vectors, and a result a sum of a value's numbers times the weights'
// vectors. So heads of 10 or 40 channels leave no lane empty, maxima and sums need nothing of another lane, and keys
// and values are read where they are (half precision is widened once a head). A block's keys are summed by themselves
// and then added: a result's bits depend on its own query, and on neither the tile nor the threads.
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

constexpr int kVectorsOfTile = 3;
// Rows that are multiplied at once: their sums fill the 32 registers of AVX-512, or 16, but for those of the operands.
constexpr int kRows = W >= 16 ? 8 : 4;
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
#pragma GCC unroll 3
        for (int t = 0; t < T; ++t) sums[r][t] = F{};
    }
    for (int64_t i = 0, at = 0; i < n; ++i, at += step, b += T * W) {
        F vectors[T];
#pragma GCC unroll 3
        for (int t = 0; t < T; ++t) vectors[t] = load_floats(b + t * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F number = Simd::splat(rows[r][at]);
#pragma GCC unroll 3
            for (int t = 0; t < T; ++t) sums[r][t] = fma(number, vectors[t], sums[r][t]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
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

// The numbers of one head: [rows, channels], of any distance between rows.
struct Head {
    const float* data;
    int64_t row;
};

// A tile's queries, [channels, T W], to its results in the same place. scores: room for kKeys rows, sums: for channels.
template <int T, bool kRough>
void attend(const Params& p, Head k, Head v, float* q, float* scores, float* sums) {
    constexpr auto counts = std::make_integer_sequence<int, kRows>();
    F most[T], total[T], factor[T];
    for (int t = 0; t < T; ++t) most[t] = F{} - __builtin_inff(), total[t] = F{};
    for (int64_t first = 0; first < p.keys; first += kKeys) {
        const int64_t n = std::min(kKeys, p.keys - first);
        multiply_rows<T>(n, k.data + first * k.row, k.row, 1, q, p.channels, nullptr, scores, counts);
        F top[T], part[T];
        for (int t = 0; t < T; ++t) top[t] = most[t], part[t] = F{};
        for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 3
            for (int t = 0; t < T; ++t) {
                const F score = load_floats(scores + (j * T + t) * W);
                top[t] = top[t] < score ? score : top[t];
            }
        for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 3
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
        multiply_rows<T>(p.channels, v.data + first * v.row, 1, v.row, scores, n, first ? factor : nullptr, sums,
                         counts);
    }
    for (int t = 0; t < T; ++t) total[t] = 1.0f / total[t];
    for (int64_t c = 0; c < p.channels; ++c)
        for (int t = 0; t < T; ++t) {
            const int64_t at = (c * T + t) * W;
            store_floats(q + at, load_floats(sums + at) * total[t]);
        }
}

View view_of(const Heads& heads, int dtype) {
    View view;
    view.data = heads.data, view.dtype = dtype;
    return view;
}

int64_t place(const Heads& heads, int64_t b, int64_t h) { return b * heads.batch_stride + h * heads.head_stride; }

// A head's rows as float32: where they are, or widened to `room`.
Head head_of(const Params& p, const Heads& heads, int64_t b, int64_t h, float* room, bool held) {
    const int64_t first = place(heads, b, h);
    if (p.dtype == kFloat32) return {static_cast<const float*>(heads.data) + first, heads.row_stride};
    const View view = view_of(heads, p.dtype);
    if (!held)
        for (int64_t r = 0; r < p.keys; ++r) {
            const int64_t at = first + r * heads.row_stride;
            int64_t c = 0;
            for (; c + W <= p.channels; c += W) store_floats(room + r * p.channels + c, load_dense(view, at + c));
            for (; c < p.channels; ++c) room[r * p.channels + c] = load_one(view, at + c);
        }
    return {room, p.channels};
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
    const int64_t widened = p.dtype == kFloat32 ? 0 : p.keys * p.channels;
    float* const q = scratch((2 * p.channels + kKeys) * lanes + 2 * widened);
    float* const sums = q + p.channels * lanes;
    float* const scores = sums + p.channels * lanes;
    float* const room = scores + kKeys * lanes;
    const View from = view_of(p.q, p.dtype), to = view_of(p.out, p.dtype);
    const float scale = p.scale * 1.4426950408889634f;  // log2 e: weights are powers of two
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
        const int64_t head = unit / work.tiles, b = head / p.heads, h = head % p.heads;
        const bool held = held_call == work.call && held_head == head;
        const Head k = head_of(p, p.k, b, h, room, held), v = head_of(p, p.v, b, h, room + widened, held);
        held_call = work.call, held_head = head;
        const int64_t first = unit % work.tiles * lanes, count = std::min(lanes, p.queries - first);
        const int64_t vectors = (count + W - 1) / W, width = vectors * W;
        for (int64_t lane = 0; lane < width; ++lane) {
            const int64_t at = place(p.q, b, h) + (first + lane) * p.q.row_stride;
            for (int64_t c = 0; c < p.channels; ++c)
                q[c * width + lane] = lane < count ? load_one(from, at + c) * scale : 0.0f;
        }
        (vectors == 3   ? attend<3, kRough>
         : vectors == 2 ? attend<2, kRough>
                        : attend<1, kRough>)(p, k, v, q, scores, sums);
        for (int64_t lane = 0; lane < count; ++lane) {
            const int64_t at = place(p.out, b, h) + (first + lane) * p.out.row_stride;
            for (int64_t c = 0; c < p.channels; ++c) store_one(to, at + c, q[c * width + lane]);
        }
    }
}

}  // namespace

void attention(const AttentionParams& params, int threads) {
    const Params& p = params;
    constexpr int64_t lanes = kVectorsOfTile * W;
    static std::atomic<uint64_t> calls{0};
    const Work work{p, ++calls, (p.queries + lanes - 1) / lanes};
    // A grain's 8 microseconds (parallel.h) are taken as 400,000 multiplications; a weight costs as much as 20.
    const int64_t macs = lanes * p.keys * (2 * p.channels + 20);
    parallel_for(p.batch * p.heads * work.tiles, 1, threads, p.dtype == kBFloat16 ? range<true> : range<false>, &work,
                 std::max<int64_t>(1, macs / 400'000));
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
