// Channels' moments and their normalisation where the vectors' lanes are channels and the rows are pixels
// (channels_last). A strip of rows is walked tile by tile, so memory is read nearly in its own order.
#pragma once

#include "cpu/silu.h"
#include "cpu/tile.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {

constexpr int64_t kWide = 1024;  // channels that are walked side by side, at most
constexpr int64_t kRows = 64;    // rows walked tile by tile, and summed in float32 before they are merged in float64
constexpr int64_t kFirst = 8;    // rows whose mean the first block is summed around

// `lanes` channels of one input, at most kWide: consecutive elements, once for each of `rows` pixels.
struct Rectangle {
    const void* data;
    int64_t at, stride, out_at, out_stride, rows, lanes;
};

// Puts numbers that lie as memory has their lanes in the order of the tiles' elements, or (kBack) the other way.
template <int D, bool kBack, class T>
void deal(int64_t lanes, T* numbers) {
    if (D != kBFloat16) return;
    tiles(lanes, [&](auto tile, int64_t lane, int) {
        constexpr int V = decltype(tile)::vectors;
        if (!kPaired<D, V>) return;
        T dealt[V * W];
        for (int i = 0; i < V * W; ++i)
            dealt[kBack ? lane_of<D, V>(i) : i] = numbers[lane + (kBack ? i : lane_of<D, V>(i))];
        memcpy(numbers + lane, dealt, sizeof(dealt));
    });
}

// The sums over rows [begin, end) of the differences to their lanes' `around`, and those of the squares.
template <int D>
void sum_rows(const Rectangle& r, int64_t begin, int64_t end, const float* around, float* sums, float* squares) {
    tiles(r.lanes, [&](auto tile, int64_t lane, int count) {
        constexpr int V = decltype(tile)::vectors;
        F x[V], a[V], s[V] = {}, q[V] = {};
        memcpy(a, around + lane, sizeof(a));
        for (int64_t i = begin; i < end; ++i) {
            load_tile<D, V, decltype(tile)::part>(r.data, r.at + i * r.stride + lane, count, x);
            for (int v = 0; v < V; ++v) {
                const F d = x[v] - a[v];
                s[v] += d;
                q[v] = fma(d, d, q[v]);
            }
        }
        memcpy(sums + lane, s, sizeof(s));
        memcpy(squares + lane, q, sizeof(q));
    });
}

// Each lane's mean and sum of squared deviations. A block of rows is summed around the mean of the block before it, the
// first around that of its own first rows: with that the squares' sum is at most ten times the deviations', whatever
// the numbers are, so one pass over memory loses no accuracy.
template <int D>
void row_moments(const Rectangle& r, double* __restrict mean, double* __restrict m2) {
    float around[kWide] = {}, sums[kWide], squares[kWide];
    const int64_t first = std::min(r.rows, kFirst);
    sum_rows<D>(r, 0, first, around, sums, squares);
    for (int64_t i = 0; i < r.lanes; ++i) {
        around[i] = sums[i] * (1.0f / static_cast<float>(first));
        mean[i] = m2[i] = 0;
    }
    for (int64_t row = 0; row < r.rows; row += kRows) {
        const int64_t end = std::min(r.rows, row + kRows);
        sum_rows<D>(r, row, end, around, sums, squares);
        const double before = static_cast<double>(row), share = 1 / static_cast<double>(end - row);
        const double rest = static_cast<double>(end - row) / static_cast<double>(end);
        for (int64_t i = 0; i < r.lanes; ++i) {  // Moments::merge, of equal counts
            const double off = sums[i] * share, block_mean = around[i] + off, delta = block_mean - mean[i];
            mean[i] += delta * rest;
            m2[i] += (squares[i] - sums[i] * off) + delta * delta * (before * rest);
            around[i] = static_cast<float>(block_mean);
        }
    }
    deal<D, true>(r.lanes, mean);
    deal<D, true>(r.lanes, m2);
}

// (x - mean) scale + shift and its SiLU, with one of each for every lane, dealt.
template <int D, bool kSilu>
void normalise_rows(const Rectangle& r, void* out, const float* mean, const float* scale, const float* shift) {
    tiles(r.lanes, [&](auto tile, int64_t lane, int count) {
        constexpr int V = decltype(tile)::vectors;
        constexpr bool kPart = decltype(tile)::part;
        F x[V], m[V], s[V], t[V];
        memcpy(m, mean + lane, sizeof(m));
        memcpy(s, scale + lane, sizeof(s));
        memcpy(t, shift + lane, sizeof(t));
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
