// Channels' moments and their normalisation where the vectors' lanes are channels and the rows are pixels
// (channels_last).
#pragma once

#include "cpu/silu.h"
#include "cpu/tile.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {

constexpr int64_t kRows = 64;  // rows summed in float32 before they are merged in float64
constexpr int64_t kFirst = 8;  // rows whose mean the first block is summed around

// `lanes` channels of one input: consecutive elements, once for each of `rows` pixels.
struct Rectangle {
    const void* data;
    int64_t at, stride, out_at, out_stride, rows, lanes;
};

// The numbers of a tile's lanes, in the order of its elements.
template <int D, int V>
FASTDIFF_HD void distribute(const float* numbers, F (&distributed)[V]) {
    float elements[V * W];
    for (int i = 0; i < V * W; ++i) elements[i] = numbers[lane_of<D, V>(i)];
    memcpy(distributed, elements, sizeof(distributed));
}

// Each lane's mean and sum of squared deviations. A block of rows is summed around the mean of the block before it, the
// first around that of its own first rows: with that the squares' sum is at most ten times the deviations', whatever
// the numbers are, so one pass over memory loses no accuracy.
template <int D>
void row_moments(const Rectangle& r, double* mean, double* m2) {
    tiles(r.lanes, [&](auto tile, int64_t lane, int count) {
        constexpr int V = decltype(tile)::vectors;
        const auto load = [&](int64_t row, F(&x)[V]) {
            load_tile<D, V, decltype(tile)::part>(r.data, r.at + row * r.stride + lane, count, x);
        };
        F x[V], shift[V] = {};
        const int64_t first = std::min(r.rows, kFirst);
        for (int64_t row = 0; row < first; ++row) {
            load(row, x);
            for (int v = 0; v < V; ++v) shift[v] += x[v];
        }
        for (int v = 0; v < V; ++v) shift[v] = shift[v] * (1.0f / static_cast<float>(first));
        double mean_of[V * W] = {}, m2_of[V * W] = {};
        for (int64_t row = 0; row < r.rows; row += kRows) {
            const int64_t end = std::min(r.rows, row + kRows);
            F sum[V] = {}, squares[V] = {};
            for (int64_t i = row; i < end; ++i) {
                load(i, x);
                for (int v = 0; v < V; ++v) {
                    const F d = x[v] - shift[v];
                    sum[v] += d;
                    squares[v] = fma(d, d, squares[v]);
                }
            }
            const double n = static_cast<double>(end - row), total = static_cast<double>(end);
            float s[V * W], q[V * W], around[V * W];
            memcpy(s, sum, sizeof(s));
            memcpy(q, squares, sizeof(q));
            memcpy(around, shift, sizeof(around));
            for (int i = 0; i < V * W; ++i) {  // Moments::merge, of equal counts
                const double off = s[i] * (1 / n), block_mean = around[i] + off, delta = block_mean - mean_of[i];
                mean_of[i] += delta * (n / total);
                m2_of[i] += (q[i] - s[i] * off) + delta * delta * (static_cast<double>(row) * n / total);
                around[i] = static_cast<float>(block_mean);
            }
            memcpy(shift, around, sizeof(shift));
        }
        for (int i = 0; i < count; ++i) {
            mean[lane + lane_of<D, V>(i)] = mean_of[i];
            m2[lane + lane_of<D, V>(i)] = m2_of[i];
        }
    });
}

// (x - mean) scale + shift and its SiLU, with one of each for every lane.
template <int D, bool kSilu>
void normalise_rows(const Rectangle& r, void* out, const float* mean, const float* scale, const float* shift) {
    tiles(r.lanes, [&](auto tile, int64_t lane, int count) {
        constexpr int V = decltype(tile)::vectors;
        constexpr bool kPart = decltype(tile)::part;
        F x[V], m[V], s[V], t[V];
        distribute<D>(mean + lane, m);
        distribute<D>(scale + lane, s);
        distribute<D>(shift + lane, t);
        for (int64_t i = 0; i < r.rows; ++i) {
            load_tile<D, V, kPart>(r.data, r.at + i * r.stride + lane, count, x);
            for (int v = 0; v < V; ++v) {
                x[v] = fma(x[v] - m[v], s[v], t[v]);
                if (kSilu) x[v] = silu<D == kBFloat16>(x[v]);
            }
            store_tile<D, V, kPart>(out, r.out_at + i * r.out_stride + lane, count, x);
        }
    });
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
