// GroupNorm of cat(x, x2) + add, then SiLU, without the concatenation: see GroupNormSiluParams in fastdiff.h.
//
// A unit is a sample's block of whole groups, read once for the statistics and once more, from the core's cache where
// it fits, to be normalised. In channels_last the vectors' lanes are channels, and the rows that are summed are pixels;
// in a contiguous tensor a channel is a run of pixels.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/entry.h"
#include "cpu/parallel.h"
#include "cpu/silu.h"
#include "cpu/tile.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {
namespace {

using Params = GroupNormSiluParams;

constexpr int kTile = 4;                   // vectors of lanes that are walked side by side
constexpr int kLanes = kTile * W;          // and their lanes
constexpr int64_t kRows = 64;              // rows summed in float32 before they are merged in float64
constexpr int64_t kFirst = 8;              // rows whose mean the first block is summed around
constexpr int64_t kSpan = kRows * kLanes;  // the pixels of a run that are summed in float32
constexpr int64_t kMaxGroups = 128;        // groups of a unit
constexpr int64_t kLine = 64;              // bytes of a cache line
constexpr int64_t kUnitElements = 8192;    // some 3 microseconds of work

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

// Channels `channel` to `channel` + `lanes` of one input: consecutive elements, once for each of `rows` pixels.
struct Rectangle {
    const void* data;
    int64_t at, stride, out_at, out_stride, rows, lanes, channel;
};

// The number of channel c, a NaN as the usual one.
float number(const Channels& v, int64_t b, int64_t c, float absent) {
    if (v.data == nullptr) return absent;
    View view;
    view.data = const_cast<void*>(v.data);
    view.dtype = v.dtype;
    const float value = load_one(view, b * v.batch_stride + c);
    return value == value ? value : __builtin_nanf("");
}

// Each lane's mean and sum of squared deviations. A block of rows is summed around the mean of the block before it, the
// first around that of its own first rows: with that the squares' sum is at most ten times the deviations', whatever
// the numbers are, so one pass over memory loses no accuracy.
template <int D, int V, bool kPart>
void lane_moments(const Rectangle& r, int64_t lane, int count, double* mean, double* m2) {
    const int64_t start = r.at + lane;
    F x[V], shift[V] = {};
    const int64_t first = std::min(r.rows, kFirst);
    for (int64_t row = 0; row < first; ++row) {
        load_tile<D, V, kPart>(r.data, start + row * r.stride, count, x);
        for (int v = 0; v < V; ++v) shift[v] += x[v];
    }
    for (int v = 0; v < V; ++v) shift[v] = shift[v] * (1.0f / static_cast<float>(first));
    double mean_of[V * W] = {}, m2_of[V * W] = {};
    for (int64_t row = 0; row < r.rows; row += kRows) {
        const int64_t end = std::min(r.rows, row + kRows);
        F sum[V] = {}, squares[V] = {};
        for (int64_t i = row; i < end; ++i) {
            load_tile<D, V, kPart>(r.data, start + i * r.stride, count, x);
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
        for (int i = 0; i < V * W; ++i) {
            const double off = s[i] * (1 / n), block_mean = around[i] + off, delta = block_mean - mean_of[i];
            mean_of[i] += delta * (n / total);
            m2_of[i] += (q[i] - s[i] * off) + delta * delta * (static_cast<double>(row) * n / total);
            around[i] = static_cast<float>(block_mean);
        }
        memcpy(shift, around, sizeof(shift));
    }
    for (int i = 0; i < V * W; ++i) {
        mean[lane_of<D, V>(i)] = mean_of[i];
        m2[lane_of<D, V>(i)] = m2_of[i];
    }
}

// (x - mean) scale + shift and its SiLU, with one of each for every lane.
template <int D, bool kSilu, int V, bool kPart>
void normalise(const Rectangle& r, int64_t lane, int count, void* out, const float* mean, const float* scale,
               const float* shift) {
    F m[V], s[V], t[V];
    float dealt[3][V * W];
    for (int i = 0; i < V * W; ++i) {
        dealt[0][i] = mean[lane_of<D, V>(i)];
        dealt[1][i] = scale[lane_of<D, V>(i)];
        dealt[2][i] = shift[lane_of<D, V>(i)];
    }
    memcpy(m, dealt[0], sizeof(m));
    memcpy(s, dealt[1], sizeof(s));
    memcpy(t, dealt[2], sizeof(t));
    for (int64_t row = 0; row < r.rows; ++row) {
        F x[V];
        load_tile<D, V, kPart>(r.data, r.at + lane + row * r.stride, count, x);
        for (int v = 0; v < V; ++v) {
            x[v] = fma(x[v] - m[v], s[v], t[v]);
            if (kSilu) x[v] = silu<D == kBFloat16>(x[v]);
        }
        store_tile<D, V, kPart>(out, r.out_at + lane + row * r.out_stride, count, x);
    }
}

template <int V, bool kPart>
struct Tile {
    static constexpr int vectors = V;
    static constexpr bool part = kPart;
};

// Calls visit(tile, lane, count) over tiles that cover the lanes.
template <class Visit>
FASTDIFF_HD void tiles(int64_t lanes, Visit visit) {
    int64_t lane = 0;
    for (; lanes - lane >= kLanes; lane += kLanes) visit(Tile<kTile, false>{}, lane, kLanes);
    if (lanes - lane >= 2 * W) {
        visit(Tile<2, false>{}, lane, 2 * W);
        lane += 2 * W;
    }
    if (lanes - lane >= W) {
        visit(Tile<1, false>{}, lane, W);
        lane += W;
    }
    if (lane < lanes) visit(Tile<1, true>{}, lane, static_cast<int>(lanes - lane));
}

// The sum of term(0) to term(n - 1), eight at a time.
template <class Term>
FASTDIFF_HD double sum_of(int n, Term term) {
    double parts[8] = {}, total = 0;
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; ++j) parts[j] += term(i + j);
    for (const double part : parts) total += part;
    for (; i < n; ++i) total += term(i);
    return total;
}

// Merges lanes of equal count, each with its own mean, into their group.
void merge_lanes(Moments& group, int lanes, int64_t rows, const double* mean, const double* m2) {
    const double centre = sum_of(lanes, [&](int i) { return mean[i]; }) / lanes;
    const double within = sum_of(lanes, [&](int i) { return m2[i]; });
    const double between = sum_of(lanes, [&](int i) { return (mean[i] - centre) * (mean[i] - centre); });
    group.merge(static_cast<double>(rows) * lanes, centre, within + between * static_cast<double>(rows));
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

// As lane_moments, of n consecutive elements, merged into their group; `add` is added to each.
template <int D>
void run_moments(const void* data, int64_t at, int64_t n, double add, Moments& group) {
    const int64_t first = std::min(n, kFirst * kLanes);
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
                F d = rest[v] - shift;
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
        group.merge(count, shift + off + add, q - s * off);
        shift = static_cast<float>(shift + off);
    }
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

// The rectangles of channels [begin, end) of sample b: one, or two where both inputs have some.
template <class Visit>
void rectangles(const Params& p, int64_t b, int64_t begin, int64_t end, Visit visit) {
    const int64_t out_at = b * p.out.batch_stride, border = std::clamp(p.channels, begin, end);
    if (begin < border)
        visit(Rectangle{p.x.data, b * p.x.batch_stride + begin, p.x.pixel_stride, out_at + begin, p.out.pixel_stride,
                        p.pixels, border - begin, begin});
    if (border < end)
        visit(Rectangle{p.x2.data, b * p.x2.batch_stride + border - p.channels, p.x2.pixel_stride, out_at + border,
                        p.out.pixel_stride, p.pixels, end - border, border});
}

// Visits channels [begin, end) of sample b: visit(channel, data, address, address in the result).
template <class Visit>
void runs(const Params& p, int64_t b, int64_t begin, int64_t end, Visit visit) {
    for (int64_t c = begin; c < end; ++c) {
        const bool second = c >= p.channels;
        const Planes& in = second ? p.x2 : p.x;
        visit(c, in.data, b * in.batch_stride + (second ? c - p.channels : c) * in.channel_stride,
              b * p.out.batch_stride + c * p.out.channel_stride);
    }
}

// What a channel's numbers are multiplied by and moved by.
struct Affine {
    float mean, scale, shift;
};

template <int D, bool kSilu>
void unit(const Params& p, int64_t b, int64_t first, int64_t last) {
    const int64_t size = (p.channels + p.channels2) / p.groups, begin = first * size, end = last * size;
    Moments moments[kMaxGroups];
    if (p.channels_last) {
        rectangles(p, b, begin, end, [&](const Rectangle& r) {
            tiles(r.lanes, [&](auto tile, int64_t lane, int count) {
                double mean[kLanes], m2[kLanes];
                lane_moments<D, tile.vectors, tile.part>(r, lane, count, mean, m2);
                const int64_t channel = r.channel + lane;
                for (int i = 0; p.add.data && i < count; ++i) mean[i] += number(p.add, b, channel + i, 0.0f);
                for (int i = 0; i < count;) {
                    const int64_t group = (channel + i) / size, rest = (group + 1) * size - channel - i;
                    const int lanes = static_cast<int>(std::min<int64_t>(count - i, rest));
                    merge_lanes(moments[group - first], lanes, r.rows, mean + i, m2 + i);
                    i += lanes;
                }
            });
        });
    } else {
        runs(p, b, begin, end, [&](int64_t c, const void* data, int64_t at, int64_t) {
            run_moments<D>(data, at, p.pixels, number(p.add, b, c, 0.0f), moments[c / size - first]);
        });
    }
    float rstd[kMaxGroups];
    for (int64_t g = 0; g < last - first; ++g)
        rstd[g] = static_cast<float>(1 / std::sqrt(moments[g].m2 / moments[g].n + p.eps));
    const auto affine = [&](int64_t c) {
        const int64_t g = c / size - first;
        return Affine{static_cast<float>(moments[g].mean - number(p.add, b, c, 0.0f)),
                      rstd[g] * number(p.weight, 0, c, 1.0f), number(p.bias, 0, c, 0.0f)};
    };
    if (p.channels_last) {
        rectangles(p, b, begin, end, [&](const Rectangle& r) {
            tiles(r.lanes, [&](auto tile, int64_t lane, int count) {
                float mean[kLanes] = {}, scale[kLanes] = {}, shift[kLanes] = {};
                for (int i = 0; i < count; ++i) {
                    const Affine a = affine(r.channel + lane + i);
                    mean[i] = a.mean, scale[i] = a.scale, shift[i] = a.shift;
                }
                normalise<D, kSilu, tile.vectors, tile.part>(r, lane, count, p.out.data, mean, scale, shift);
            });
        });
    } else {
        runs(p, b, begin, end, [&](int64_t c, const void* data, int64_t at, int64_t out_at) {
            const Affine a = affine(c);
            normalise_run<D, kSilu>(data, at, p.out.data, out_at, p.pixels, a.mean, a.scale, a.shift);
        });
    }
}

// Groups of a unit: in channels_last rows of whole cache lines, four vectors wide where that leaves every thread work.
int64_t groups_of_unit(const Params& p, int threads) {
    if (!p.channels_last) return 1;
    const int64_t size = (p.channels + p.channels2) / p.groups, line = kLine / (p.dtype == kFloat32 ? 4 : 2);
    const int64_t step = line / std::gcd(size, line);
    int64_t wanted = (kLanes + size * step - 1) / (size * step) * step;
    if (p.batch * p.groups < 2 * threads * wanted) wanted = step;
    return std::min({wanted, p.groups, kMaxGroups});
}

struct Work {
    Params p;
    int64_t groups, blocks;
};

template <int D, bool kSilu>
void range(const void* context, int64_t begin, int64_t end) {
    const Work& work = *static_cast<const Work*>(context);
    for (int64_t u = begin; u < end; ++u) {
        const int64_t first = u % work.blocks * work.groups;
        unit<D, kSilu>(work.p, u / work.blocks, first, std::min(first + work.groups, work.p.groups));
    }
}

template <int D>
RangeFunction range_of(bool silu) {
    return silu ? range<D, true> : range<D, false>;
}

}  // namespace

void group_norm_silu(const GroupNormSiluParams& params, int threads) {
    const int64_t groups = groups_of_unit(params, threads), blocks = (params.groups + groups - 1) / groups;
    const Work work{params, groups, blocks};
    const int64_t elements = params.pixels * (params.channels + params.channels2) / blocks;
    const RangeFunction function = params.dtype == kFloat32    ? range_of<kFloat32>(params.silu)
                                   : params.dtype == kBFloat16 ? range_of<kBFloat16>(params.silu)
                                                               : range_of<kFloat16>(params.silu);
    parallel_for(params.batch * blocks, std::max<int64_t>(1, kUnitElements / std::max<int64_t>(1, elements)), threads,
                 function, &work);
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
