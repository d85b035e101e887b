// out = ((x + (bias + add)) + residual) * scale, in float32 and rounded once, in the order of out's memory.
#include "cpu/entry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {

// count elements (W, but for a row's end), inner_stride apart, from address `at`.
static inline Simd::F take(const View& v, int64_t at, int count) {
    if (__builtin_expect(count == W && v.inner_stride == 1, 1)) return load_dense(v, at);
    Simd::F result = {};
    for (int i = 0; i < count; ++i) result[i] = load_one(v, at + i * v.inner_stride);
    return result;
}

static inline void put(const View& v, int64_t at, int count, Simd::F f) {
    if (__builtin_expect(count == W && v.inner_stride == 1, 1)) return store_dense(v, at, f);
    for (int i = 0; i < count; ++i) store_one(v, at + i * v.inner_stride, f[i]);
}

// bias + add for `count` channels of sample b from channel c.
static inline Simd::F shift_of(const ConvEpilogueParams& p, int64_t b, int64_t c, int count) {
    if (!p.add.data) return take(p.bias, c, count);
    const Simd::F add = take(p.add, b * p.add.batch_stride + c, count);
    return p.bias.data ? take(p.bias, c, count) + add : add;
}

static void conv_epilogue_range(const void* context, int64_t begin, int64_t end) {
    const ConvEpilogueParams p = *static_cast<const ConvEpilogueParams*>(context);  // a copy: no store changes it
    const bool shifted = p.bias.data || p.add.data;
    for (Cursor at(begin, p.length); at.group < end; at.advance()) {
        const int64_t b = at.b / p.rows, row = at.b % p.rows;
        const auto start = [b, row](const View& v) { return b * v.batch_stride + row * v.outer_stride; };
        const int64_t x = start(p.x), residual = start(p.residual), out = start(p.out);
        Simd::F shift = {};
        if (shifted && !p.channels_last) shift = Simd::splat(shift_of(p, b, row, 1)[0]);
        const int64_t last = std::min(at.first + kGroup, p.length);
        for (int64_t i = at.first; i < last; i += W) {
            const int count = static_cast<int>(std::min<int64_t>(W, last - i));
            Simd::F y = take(p.x, x + i * p.x.inner_stride, count);
            if (shifted) y = y + (p.channels_last ? shift_of(p, b, i, count) : shift);
            if (p.residual.data) y = y + take(p.residual, residual + i * p.residual.inner_stride, count);
            put(p.out, out + i * p.out.inner_stride, count, y * p.scale);
        }
    }
}

void conv_epilogue(const ConvEpilogueParams& params, int threads) {
    const int64_t unit = std::min<int64_t>(params.length, kGroup);  // elements in most of the units
    parallel_for(params.batch * params.rows * groups_in(params.length), std::max<int64_t>(kCopyGrain / unit, 1),
                 threads, conv_epilogue_range, &params);
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
