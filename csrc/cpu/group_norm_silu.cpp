// GroupNorm of cat(x, x2) + add, then SiLU, without the concatenation: see GroupNormSiluParams in fastdiff.h.
//
// A unit is a sample's block of whole groups, read once for its channels' moments and once more, from the core's cache
// where it fits, to be normalised. A group's moments are merged from its channels' alone, so the result's bits depend
// neither on what else is in the unit nor on the threads.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/entry.h"
#include "cpu/norm_rows.h"
#include "cpu/norm_runs.h"
#include "cpu/parallel.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {
namespace {

using Params = GroupNormSiluParams;

constexpr int64_t kWide = 1024;          // channels that are measured, or normalised, at a time
constexpr int64_t kMaxGroups = 128;      // groups of a unit
constexpr int64_t kLine = 32;            // channels: whole cache lines in every dtype, and two of the widest vectors
constexpr int64_t kUnits = 32;           // of a call, where it has the channels
constexpr int64_t kUnitElements = 8192;  // some 3 microseconds of work

// n numbers of channels from `at`; every NaN becomes the usual one, since store_tile rounds no other to bfloat16.
void load_channels(const Channels& v, int64_t at, int64_t n, float absent, float* to) {
    if (v.data == nullptr) {
        std::fill_n(to, n, absent);
        return;
    }
    View view;
    view.data = const_cast<void*>(v.data);
    view.dtype = v.dtype;
    for (int64_t i = 0; i < n; ++i) {
        const float number = load_one(view, at + i);
        to[i] = number == number ? number : __builtin_nanf("");
    }
}

// The rectangles of channels [begin, end) of sample b, one or two where both inputs have some: visit(rectangle, its
// first channel less begin).
template <class Visit>
void rectangles(const Params& p, int64_t b, int64_t begin, int64_t end, Visit visit) {
    const int64_t out_at = b * p.out.batch_stride, border = std::clamp(p.channels, begin, end);
    if (begin < border)
        visit(Rectangle{p.x.data, b * p.x.batch_stride + begin, p.x.pixel_stride, out_at + begin, p.out.pixel_stride,
                        p.pixels, border - begin},
              0);
    if (border < end)
        visit(Rectangle{p.x2.data, b * p.x2.batch_stride + border - p.channels, p.x2.pixel_stride, out_at + border,
                        p.out.pixel_stride, p.pixels, end - border},
              border - begin);
}

// The runs of channels [begin, end) of sample b: visit(channel less begin, data, address, address in the result).
template <class Visit>
void runs(const Params& p, int64_t b, int64_t begin, int64_t end, Visit visit) {
    for (int64_t c = begin; c < end; ++c) {
        const bool second = c >= p.channels;
        const Planes& in = second ? p.x2 : p.x;
        visit(c - begin, in.data, b * in.batch_stride + (second ? c - p.channels : c) * in.channel_stride,
              b * p.out.batch_stride + c * p.out.channel_stride);
    }
}

// The groups of channels [begin, end): visit(group, its first channel less begin, its last less begin).
template <class Visit>
FASTDIFF_HD void groups(int64_t begin, int64_t end, int64_t size, Visit visit) {
    for (int64_t c = begin, stop; c < end; c = stop) {
        const int64_t group = c / size;
        stop = std::min(end, (group + 1) * size);
        visit(group, c - begin, stop - begin);
    }
}

// Channels [begin, end), at most kWide, of groups from `first`: their moments, merged into their groups'.
template <int D>
void measure(const Params& p, int64_t b, int64_t begin, int64_t end, int64_t size, Moments* group) {
    double mean[kWide], m2[kWide];
    if (p.channels_last) {
        rectangles(p, b, begin, end, [&](const Rectangle& r, int64_t c) { row_moments<D>(r, mean + c, m2 + c); });
    } else {
        runs(p, b, begin, end, [&](int64_t c, const void* data, int64_t at, int64_t) {
            const Moments run = run_moments<D>(data, at, p.pixels);
            mean[c] = run.mean, m2[c] = run.m2;
        });
    }
    if (p.add.data) {
        float add[kWide];
        load_channels(p.add, b * p.add.batch_stride + begin, end - begin, 0.0f, add);
        for (int64_t c = 0; c < end - begin; ++c) mean[c] += add[c];
    }
    const int64_t first = begin / size;
    const double pixels = static_cast<double>(p.pixels);
    groups(begin, end, size, [&](int64_t g, int64_t from, int64_t to) {
        const double* means = mean + from;
        const double centre = sum_of(to - from, [&](int64_t i) { return means[i]; }) / static_cast<double>(to - from);
        const double within = sum_of(to - from, [&](int64_t i) { return m2[from + i]; });
        const double between = sum_of(to - from, [&](int64_t i) { return (means[i] - centre) * (means[i] - centre); });
        group[g - first].merge(pixels * static_cast<double>(to - from), centre, within + between * pixels);
    });
}

template <int D, bool kSilu>
void apply(const Params& p, int64_t b, int64_t begin, int64_t end, int64_t size, const Moments* group) {
    float mean[kWide + W], scale[kWide + W], shift[kWide + W];
    load_channels(p.add, b * p.add.batch_stride + begin, end - begin, 0.0f, mean);
    load_channels(p.weight, begin, end - begin, 1.0f, scale);
    load_channels(p.bias, begin, end - begin, 0.0f, shift);
    for (float* numbers : {mean, scale, shift}) std::fill_n(numbers + end - begin, W, 0.0f);
    const int64_t first = begin / size;
    groups(begin, end, size, [&](int64_t g, int64_t from, int64_t to) {
        const Moments& moments = group[g - first];
        const float rstd = static_cast<float>(1 / std::sqrt(moments.m2 / moments.n + p.eps));
        for (int64_t c = from; c < to; ++c) {
            mean[c] = static_cast<float>(moments.mean - mean[c]);
            scale[c] *= rstd;
        }
    });
    if (p.channels_last) {
        rectangles(p, b, begin, end, [&](const Rectangle& r, int64_t c) {
            normalise_rows<D, kSilu>(r, p.out.data, mean + c, scale + c, shift + c);
        });
    } else {
        runs(p, b, begin, end, [&](int64_t c, const void* data, int64_t at, int64_t out_at) {
            normalise_run<D, kSilu>(data, at, p.out.data, out_at, p.pixels, mean[c], scale[c], shift[c]);
        });
    }
}

// Groups of a unit: one in a contiguous tensor; in channels_last whole cache lines of channels, as many as leave the
// call kUnits units, but no more than kWide channels where one group has not. A rule of shapes: threads come and go.
int64_t groups_of_unit(const Params& p, int64_t size) {
    if (!p.channels_last) return 1;
    const int64_t step = kLine / std::gcd(size, kLine);
    const int64_t parts = (kUnits + p.batch - 1) / std::max<int64_t>(1, p.batch);
    const int64_t wanted = ((p.groups + parts - 1) / parts + step - 1) / step * step;
    return std::min({wanted, p.groups, kMaxGroups, std::max<int64_t>(1, kWide / size)});
}

struct Work {
    Params p;
    int64_t size, groups, blocks;
};

template <int D, bool kSilu>
void range(const void* context, int64_t first_unit, int64_t last_unit) {
    const Work& work = *static_cast<const Work*>(context);
    for (int64_t u = first_unit; u < last_unit; ++u) {
        const int64_t b = u / work.blocks, first = u % work.blocks * work.groups;
        const int64_t begin = first * work.size, end = std::min(first + work.groups, work.p.groups) * work.size;
        Moments moments[kMaxGroups];
        // More than one step only where a single group is wider.
        for (int64_t c = begin; c < end; c += kWide)
            measure<D>(work.p, b, c, std::min(end, c + kWide), work.size, moments);
        for (int64_t c = begin; c < end; c += kWide)
            apply<D, kSilu>(work.p, b, c, std::min(end, c + kWide), work.size, moments);
    }
}

template <int D>
RangeFunction range_of(bool silu) {
    return silu ? range<D, true> : range<D, false>;
}

}  // namespace

void group_norm_silu(const GroupNormSiluParams& params, int threads) {
    const int64_t size = (params.channels + params.channels2) / params.groups, groups = groups_of_unit(params, size);
    const int64_t blocks = (params.groups + groups - 1) / groups;
    const Work work{params, size, groups, blocks};
    const int64_t elements = params.pixels * (params.channels + params.channels2) / blocks;
    const RangeFunction function = params.dtype == kFloat32    ? range_of<kFloat32>(params.silu)
                                   : params.dtype == kBFloat16 ? range_of<kBFloat16>(params.silu)
                                                               : range_of<kFloat16>(params.silu);
    parallel_for(params.batch * blocks, std::max<int64_t>(1, kUnitElements / std::max<int64_t>(1, elements)), threads,
                 function, &work);
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
