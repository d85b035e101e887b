// A channel's moments and its normalisation where it is a run of consecutive pixels (contiguous tensors).
#pragma once

#include "cpu/silu.h"
#include "cpu/tile.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {

constexpr int64_t kHead = 8 * kLanes;   // pixels whose mean the first span is summed around
constexpr int64_t kSpan = 64 * kLanes;  // pixels that are summed in float32

// Count, mean and sum of squared deviations, merged by Chan, Golub and LeVeque (1983).
struct Moments {
    double n = 0, mean = 0, m2 = 0;

    void merge(double count, double other_mean, double other_m2) {
        const double delta = other_mean - mean, total = n + count;
        mean += delta * (count / total);
        m2 += other_m2 + delta * delta * (n * count / total);
        n = total;
    }
};

// The sum of term(0) to term(n - 1), eight at a time.
template <class Term>
FASTDIFF_HD double sum_of(int64_t n, Term term) {
    double parts[8] = {}, total = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; ++j) parts[j] += term(i + j);
    for (const double part : parts) total += part;
    for (; i < n; ++i) total += term(i);
    return total;
}

// The sum of n consecutive elements.
template <int D>
double run_sum(const void* data, int64_t at, int64_t n) {
    F sum[kTile] = {}, x[kTile];
    int64_t i = 0;
    for (; n - i >= kLanes; i += kLanes) {
        load_tile<D, kTile, false>(data, at + i, kLanes, x);
        for (int v = 0; v < kTile; ++v) sum[v] += x[v];
    }
    tiles(n - i, [&](auto tile, int64_t lane, int count) {
        F rest[tile.vectors];
        load_tile<D, tile.vectors, tile.part>(data, at + i + lane, count, rest);
        for (int v = 0; v < tile.vectors; ++v) sum[v] += rest[v];
    });
    const F total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return sum_of(W, [&](int lane) { return static_cast<double>(total[lane]); });
}

// The moments of n consecutive elements, as row_moments has them.
template <int D>
Moments run_moments(const void* data, int64_t at, int64_t n) {
    Moments run;
    const int64_t first = std::min(n, kHead);
    float shift = static_cast<float>(run_sum<D>(data, at, first) / static_cast<double>(first));
    for (int64_t begin = 0; begin < n; begin += kSpan) {
        const int64_t span = std::min(n - begin, kSpan), start = at + begin;
        F sum[kTile] = {}, squares[kTile] = {}, x[kTile];
        int64_t i = 0;
        for (; span - i >= kLanes; i += kLanes) {
            load_tile<D, kTile, false>(data, start + i, kLanes, x);
            for (int v = 0; v < kTile; ++v) {
                const F d = x[v] - shift;
                sum[v] += d;
                squares[v] = fma(d, d, squares[v]);
            }
        }
        tiles(span - i, [&](auto tile, int64_t lane, int count) {
            F rest[tile.vectors];
            load_tile<D, tile.vectors, tile.part>(data, start + i + lane, count, rest);
            for (int v = 0; v < tile.vectors; ++v) {
                F d = rest[v] - shift;  // lanes past the end hold 0 - shift, which is no element's deviation
                for (int l = count; tile.part && l < W; ++l) d[l] = 0;
                sum[v] += d;
                squares[v] = fma(d, d, squares[v]);
            }
        });
        const F sums = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        const F all = (squares[0] + squares[1]) + (squares[2] + squares[3]);
        const double s = sum_of(W, [&](int lane) { return static_cast<double>(sums[lane]); });
        const double q = sum_of(W, [&](int lane) { return static_cast<double>(all[lane]); });
        const double count = static_cast<double>(span), off = s / count;
        run.merge(count, shift + off, q - s * off);
        shift = static_cast<float>(shift + off);
    }
    return run;
}

template <int D, bool kSilu>
void normalise_run(const void* data, int64_t at, void* out, int64_t out_at, int64_t n, float mean, float scale,
                   float shift) {
    const F s = F{} + scale, t = F{} + shift;
    tiles(n, [&](auto tile, int64_t lane, int count) {
        F x[tile.vectors];
        load_tile<D, tile.vectors, tile.part>(data, at + lane, count, x);
        for (int v = 0; v < tile.vectors; ++v) {
            x[v] = fma(x[v] - mean, s, t);
            if (kSilu) x[v] = silu<D == kBFloat16>(x[v]);
        }
        store_tile<D, tile.vectors, tile.part>(out, out_at + lane, count, x);
    });
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
