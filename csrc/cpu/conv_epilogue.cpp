// out = ((x + shift) + residual) * scale, in float32 and rounded once, in the order of out's memory.
#include "cpu/entry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {

// count elements, inner_stride apart, from address `at`; `whole` promises W of them, side by side.
FASTDIFF_HD Simd::F load_elements(const View& v, int64_t at, int count, bool whole) {
    if (__builtin_expect(whole, 1)) return load_dense(v, at);
    Simd::F result = {};
    for (int i = 0; i < count; ++i) result[i] = load_one(v, at + i * v.inner_stride);
    return result;
}

FASTDIFF_HD void store_elements(const View& v, int64_t at, int count, bool whole, Simd::F f) {
    if (__builtin_expect(whole, 1)) return store_dense(v, at, f);
    for (int i = 0; i < count; ++i) store_one(v, at + i * v.inner_stride, f[i]);
}

template <int kDType>
static void conv_epilogue_range(const void* context, int64_t begin, int64_t end) {
    ConvEpilogueParams p = *static_cast<const ConvEpilogueParams*>(context);  // a copy: no store changes it
    p.x.dtype = p.residual.dtype = p.out.dtype = kDType;                      // known to the compiler
    const View shifts{const_cast<float*>(p.shift), kFloat32, 0, 0, 0, 1};
    const bool side_by_side =
        p.x.inner_stride == 1 && p.out.inner_stride == 1 && (!p.residual.data || p.residual.inner_stride == 1);
    for (Cursor at(begin, p.length); at.group < end; at.advance()) {
        const int64_t b = at.b / p.rows, row = at.b % p.rows;
        const int64_t x = b * p.x.batch_stride + row * p.x.outer_stride;
        const int64_t residual = b * p.residual.batch_stride + row * p.residual.outer_stride;
        const int64_t out = b * p.out.batch_stride + row * p.out.outer_stride;
        const int64_t last = std::min(at.first + kGroup, p.length);
        for (int64_t i = at.first; i < last; i += W) {
            const int count = static_cast<int>(std::min<int64_t>(W, last - i));
            const bool whole = side_by_side && count == W;
            Simd::F y = load_elements(p.x, x + i * p.x.inner_stride, count, whole);
            if (p.shift && p.channels_last) y = y + load_elements(shifts, b * p.shift_stride + i, count, count == W);
            if (p.shift && !p.channels_last) y = y + p.shift[b * p.shift_stride + row];
            if (p.residual.data)
                y = y + load_elements(p.residual, residual + i * p.residual.inner_stride, count, whole);
            store_elements(p.out, out + i * p.out.inner_stride, count, whole, y * p.scale);
        }
    }
}

void conv_epilogue(const ConvEpilogueParams& params, int threads) {
    const RangeFunction ranges[] = {conv_epilogue_range<kFloat32>, conv_epilogue_range<kBFloat16>,
                                    conv_epilogue_range<kFloat16>};
    const int64_t unit = std::min<int64_t>(params.length, kGroup);  // elements in most of the units
    parallel_for(params.batch * params.rows * groups_in(params.length), std::max<int64_t>(kCopyGrain / unit, 1),
                 threads, ranges[params.x.dtype], &params);
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
