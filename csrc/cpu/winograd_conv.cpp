// A 3x3 convolution by Winograd's F(2x2, 3x3) (Lavin & Gray 2016): 16 multiplications for four results, not 36.
//
// A tile is four results, 2x2, of the 4x4 numbers around them. In one dimension, with numbers d and weights g,
//
//     y0 = m0 + m1 + m2,   y1 = m1 - m2 - m3,
//     m0 = (d0 - d2) g0,   m1 = (d1 + d2) (g0 + g1 + g2) / 2,   m2 = (d2 - d1) (g0 - g1 + g2) / 2,   m3 = (d1 - d3) g2;
//
// two dimensions are one after the other. In an image doubled by its nearest neighbours d1 = d2, so m2 is nothing: 9
// multiplications a tile. The sums over channels are, for each of the 16 (or 9) points, a matrix product of tiles x
// channels and channels x features.
//
// A block of tiles is transformed once; its numbers are read once for each panel of 32 features. float32 weights lie in
// memory as they are, 9 numbers each, and are transformed a sum's channels at a time into the core's cache, where all
// tiles of the block use them: a network at batch 1 reads its weights from memory, and 9 numbers come faster than 16.
// The products of 64 channels (all of them, up to 128) are summed in registers and these sums are added up: the
// rounding error of n terms added in blocks of s grows as sqrt(s + n / s), where that of one running sum grows as
// sqrt(n). A result's bits depend on nothing but its window: neither on its place in a block nor on the threads.
//
// Weights lie as [panels, channels, 9, 32], the last panel filled with zeros. Pairs of bfloat16 channels, whose
// products round the transformed numbers, are transformed when they are packed: [panels, points, 2, channels / 2, 16,
// 2].
#include <atomic>

#include "cpu/entry.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {
namespace {

using Params = WinogradConvParams;

constexpr int kPanel = 32;         // features
constexpr int kHalf = kPanel / 2;  // of them, whose weights are side by side: a cache line
constexpr int kWords = 16;         // of 4 bytes, one or two channels each, that lie side by side: a chunk
// Tiles that are multiplied at once: their sums, two vectors each, fill the 32 registers of AVX-512, or 16, but for
// those that two vectors of weights and a number are in.
constexpr int kRows = W >= 16 ? 12 : 6;
constexpr int64_t kSum = 64 / kWords;  // chunks of float32 numbers that are summed at once; twice as many if all are
constexpr int64_t kBlock = 2 << 20;    // bytes of a block of tiles' float32 numbers
constexpr int64_t kLeast = 48;         // tiles of such a block
constexpr int64_t kCached = 8 << 20;   // bytes of weights that are expected to stay in a shared cache
constexpr int64_t kLine = 64;          // bytes of a cache line

enum Product { kFloats, kPairs, kPairsByFloats };

// c + a b, of words that are numbers or pairs of bfloat16 numbers.
template <Product kProduct>
FASTDIFF_HD F product(F a, F b, F c) {
    if (kProduct == kFloats) return fma(a, b, c);
#if defined(__AVX512F__)
    if (kProduct == kPairs) {
        // Not the intrinsic: this file is compiled for CPUs without it, too.
        asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
        return c;
    }
#endif
    const Simd::U first = bit_cast<Simd::U>(a), second = bit_cast<Simd::U>(b);
    c = fma(bit_cast<F>(first & 0xffff0000u), bit_cast<F>(second & 0xffff0000u), c);
    return fma(bit_cast<F>(first << 16), bit_cast<F>(second << 16), c);
}

FASTDIFF_HD F load_words(const void* at) {
    F words;
    memcpy(&words, at, sizeof(words));
    return words;
}

// m[r] = the product of row r, whose chunks are kRows apart at v, and 2 W features; added to m[r] where `more`. The
// sums stay in registers: their loops are unrolled, and nothing takes their address.
template <int R, Product kProduct>
__attribute__((noinline)) void multiply(const uint32_t* v, const uint32_t* u, int64_t other, int64_t chunks, bool more,
                                        float* m) {
    F low[R], high[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) low[r] = high[r] = F{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk, v += kRows * kWords)
        for (int word = 0; word < kWords; ++word, u += kHalf) {
            const F first = load_words(u), second = load_words(u + other);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const F number = bit_cast<F>(Simd::splat_uint(v[r * kWords + word]));
                low[r] = product<kProduct>(number, first, low[r]);
                high[r] = product<kProduct>(number, second, high[r]);
            }
        }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        if (more) low[r] = load_words(m + r * kPanel) + low[r], high[r] = load_words(m + r * kPanel + W) + high[r];
        memcpy(m + r * kPanel, &low[r], sizeof(F));
        memcpy(m + r * kPanel + W, &high[r], sizeof(F));
    }
}

// Of one point and sum: v is [groups of kRows tiles, chunks, kRows, words], u [2, chunks, words, 16], m [tiles, 32].
// Of a last, smaller group more rows may be computed than there are; m must have room for them after its own.
// Meanwhile next_bytes from `next`, the weights that are transformed after these, are fetched from memory: the
// transform alone would wait for all of them, and the multiplication leaves the memory idle.
template <Product kProduct>
void multiply_rows(const uint32_t* v, int64_t group, const uint32_t* u, int64_t chunks, int64_t rows, bool more,
                   float* m, const char* next, int64_t next_bytes) {
    const int64_t step = next_bytes / ((rows + kRows - 1) / kRows);
    const int64_t half = chunks * kWords * kHalf, other = W < kHalf ? W : half;
    for (int64_t row = 0; row < rows; row += kRows, v += group, m += kRows * kPanel) {
        const int64_t left = rows - row;
        const auto function = left > kRows * 2 / 3 ? multiply<kRows, kProduct>
                              : left > kRows / 3   ? multiply<kRows * 2 / 3, kProduct>
                                                   : multiply<kRows / 3, kProduct>;
        for (int64_t i = 0; i < step; i += kLine) __builtin_prefetch(next + i, 0, 2);  // to the second cache
        next += step;
        for (int lane = 0; lane < kPanel; lane += 2 * W)
            function(v, u + lane / kHalf * half + lane % kHalf, other, chunks, more, m + lane);
    }
}

// Of both dimensions: the numbers that a tile is made from, and the points that it is multiplied at.
template <bool kUp>
constexpr int kSide = kUp ? 3 : 4;

template <bool kUp>
FASTDIFF_HD void to_points(F& a, F& b, F& c, F& d) {
    const F first = kUp ? a - b : a - c, sum = kUp ? b + b : b + c, last = kUp ? b - c : b - d;
    if (!kUp) c = c - b;
    a = first, b = sum, (kUp ? c : d) = last;
}

template <bool kUp>
FASTDIFF_HD void from_points(F a, F b, F c, F d, F& first, F& second) {
    first = kUp ? a + b : (a + b) + c;
    second = kUp ? b - c : (b - c) - d;
}

struct Work {
    Params p;
    uint64_t call;                        // differs from call to call
    int64_t rows, columns;                // tiles of an image
    int64_t tiles, block, parts, panels;  // tiles of all, of a block; parts that the panels are distributed to
    int64_t chunks, sum;                  // of a tile's numbers; of them, those that are summed in registers
    int64_t group, slice, plane;  // words of kRows tiles' numbers that are summed at once, of all tiles', of all
    int64_t product;              // numbers, at a point; words of their products
};

// Weights of `channels` channels, [channels, 9, 32], at all points, to u: [points, 2, channels, 16], whose points are
// `point` words apart.
template <bool kUp>
void transform_weights(const float* weights, int64_t channels, int64_t plane, float* u) {
    constexpr int S = kSide<kUp>;
    const auto store_row = [plane](F a, F b, F c, float* to) {
        const F outer = a + c, sum = (outer + b) * 0.5f, difference = (outer - b) * 0.5f;
        memcpy(to, &a, sizeof(F));
        memcpy(to + plane, &sum, sizeof(F));
        if (!kUp) memcpy(to + 2 * plane, &difference, sizeof(F));
        memcpy(to + (S - 1) * plane, &c, sizeof(F));
    };
    for (int64_t c = 0; c < channels; ++c, weights += 9 * kPanel)
#pragma GCC unroll 1
        for (int lane = 0; lane < kPanel; lane += W) {
            const float* const g = weights + lane;
            float* const to = u + (lane / kHalf * channels + c) * kHalf + lane % kHalf;
            const F a0 = load_words(g), a1 = load_words(g + kPanel), a2 = load_words(g + 2 * kPanel);
            const F b0 = load_words(g + 3 * kPanel), b1 = load_words(g + 4 * kPanel), b2 = load_words(g + 5 * kPanel);
            const F c0 = load_words(g + 6 * kPanel), c1 = load_words(g + 7 * kPanel), c2 = load_words(g + 8 * kPanel);
            const F outer0 = a0 + c0, outer1 = a1 + c1, outer2 = a2 + c2;
            store_row(a0, a1, a2, to);
            store_row((outer0 + b0) * 0.5f, (outer1 + b1) * 0.5f, (outer2 + b2) * 0.5f, to + S * plane);
            if (!kUp) store_row((outer0 - b0) * 0.5f, (outer1 - b1) * 0.5f, (outer2 - b2) * 0.5f, to + 2 * S * plane);
            store_row(c0, c1, c2, to + (S - 1) * S * plane);
        }
}

// A tile's numbers at all points, to v: [points, sums, groups of kRows tiles, chunks of a sum, kRows,
// words].
template <int D, bool kPairs, bool kUp>
FASTDIFF_HD void transform(const Work& work, int64_t tile, const char* zeros, uint32_t* v) {
    constexpr int S = kSide<kUp>, V = kPairs ? 2 : 1, kSize = D == kFloat32 ? 4 : 2;
    const Params& p = work.p;
    const int64_t b = tile / (work.rows * work.columns), row = tile / work.columns % work.rows;
    const int64_t top = (kUp ? row : 2 * row) - 1, left = (kUp ? 1 : 2) * (tile % work.columns) - 1;
    const char* pixels[S][S];
    for (int i = 0; i < S; ++i)
        for (int j = 0; j < S; ++j) {
            const int64_t y = top + i, x = left + j;
            const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
            const int64_t at = ((b * p.height + y) * p.width + x) * p.channels * kSize;
            pixels[i][j] = inside ? static_cast<const char*>(p.x) + at : zeros;
        }
    for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
        uint32_t* const to = v + chunk / work.sum * work.slice + chunk % work.sum * kRows * kWords;
        for (int word = 0; word < kWords; word += W) {
            F d[4][4][V];
            for (int i = 0; i < S; ++i)
                for (int j = 0; j < S; ++j)
                    load_tile<D, V, false>(pixels[i][j], (chunk * kWords + word) * V, 0, d[i][j]);
            for (int e = 0; e < V; ++e) {
                for (int j = 0; j < S; ++j) to_points<kUp>(d[0][j][e], d[1][j][e], d[2][j][e], d[3][j][e]);
                for (int i = 0; i < S; ++i) to_points<kUp>(d[i][0][e], d[i][1][e], d[i][2][e], d[i][3][e]);
            }
            for (int i = 0; i < S; ++i)
                for (int j = 0; j < S; ++j)
                    store_tile<kPairs ? kBFloat16 : kFloat32, V, false>(to + (i * S + j) * work.plane + word, 0, 0,
                                                                        d[i][j]);
        }
    }
}

// A tile's products at all points, [points, tiles, 32], to a panel of its results.
template <int D, bool kUp>
FASTDIFF_HD void transform_back(const Work& work, int64_t tile, int64_t panel, const float* m) {
    constexpr int S = kSide<kUp>;
    const Params& p = work.p;
    const int64_t height = kUp ? 2 * p.height : p.height, width = kUp ? 2 * p.width : p.width;
    const int64_t b = tile / (work.rows * work.columns);
    const int64_t top = tile / work.columns % work.rows * 2, left = tile % work.columns * 2;
    View residual, out;
    residual.data = const_cast<void*>(p.residual), out.data = p.out;
    residual.dtype = out.dtype = D;
    const int64_t end = std::min<int64_t>(kPanel, p.features - panel * kPanel);
    for (int64_t lane = 0; lane < end; lane += W) {
        F columns[2][4] = {}, y[2][2];
        for (int j = 0; j < S; ++j) {
            F point[4] = {};
            for (int i = 0; i < S; ++i) point[i] = load_words(m + (i * S + j) * work.product + lane);
            from_points<kUp>(point[0], point[1], point[2], point[3], columns[0][j], columns[1][j]);
        }
        const F bias = p.bias ? load_words(p.bias + panel * kPanel + lane) : F{};
        for (int i = 0; i < 2; ++i)
            from_points<kUp>(columns[i][0], columns[i][1], columns[i][2], columns[i][3], y[i][0], y[i][1]);
        for (int i = 0; i < 2 && top + i < height; ++i)
            for (int j = 0; j < 2 && left + j < width; ++j) {
                const int64_t at = ((b * height + top + i) * width + left + j) * p.features + panel * kPanel + lane;
                F result = y[i][j] + bias;
                if (p.residual) result = result + load_dense(residual, at);
                store_dense(out, at, result);
            }
    }
}

// The tiles whose numbers this thread's scratch holds: the next unit of the same tiles needs no second transform.
struct InScratch {
    uint64_t call;
    int64_t first_tile;
};
thread_local InScratch in_scratch{0, 0};

template <int D, Product kProduct, bool kUp>
void range(const void* context, int64_t first_unit, int64_t last_unit) {
    constexpr int64_t kPoints = kSide<kUp> * kSide<kUp>;
    constexpr bool kTransforms = kProduct == kFloats;  // weights, too
    const Work& work = *static_cast<const Work*>(context);
    const int64_t words = work.chunks * kWords, sums = (work.chunks + work.sum - 1) / work.sum;
    // Words of a sum's weights in memory and, at one point and at all, transformed: again an odd number of lines.
    const int64_t raw = work.sum * kWords * kPanel * 9;
    const int64_t plane = work.sum * kWords * kPanel + (kTransforms ? kWords : 0), block = kPoints * plane;
    const int64_t held_words = kTransforms ? block : 0;
    auto* const v = reinterpret_cast<uint32_t*>(scratch(kPoints * (work.plane + work.product) + held_words + words));
    float* const m = reinterpret_cast<float*>(v + kPoints * work.plane);
    float* const held = m + kPoints * work.product;
    char* const zeros = reinterpret_cast<char*>(held + held_words);
    const float* const weights = static_cast<const float*>(work.p.weights);
    const auto channels = [&](int64_t sum) { return std::min(work.sum, work.chunks - sum * work.sum) * kWords; };
    if (in_scratch.call != work.call) memset(zeros, 0, words * 4);  // another call's scratch was divided otherwise
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
        const int64_t first = unit / work.parts * work.block, count = std::min(work.block, work.tiles - first);
        const int64_t part = unit % work.parts;
        if (in_scratch.call != work.call || in_scratch.first_tile != first)
            for (int64_t t = 0; t < count; ++t)
                transform<D, !kTransforms, kUp>(work, first + t, zeros,
                                                v + t / kRows * work.group + t % kRows * kWords);
        in_scratch = {work.call, first};
        for (int64_t panel = part * work.panels / work.parts; panel < (part + 1) * work.panels / work.parts; ++panel) {
            for (int64_t sum = 0; sum < sums; ++sum) {
                const uint32_t* u = static_cast<const uint32_t*>(work.p.weights) + panel * block;
                const char* next = nullptr;
                int64_t next_bytes = 0;
                if (kTransforms) {
                    const float* const from = weights + panel * words * kPanel * 9 + sum * raw;
                    transform_weights<kUp>(from, channels(sum), plane, held);
                    u = reinterpret_cast<const uint32_t*>(held);
                    const float* const end = weights + work.panels * words * kPanel * 9;
                    const float* const after = from + channels(sum) * kPanel * 9;
                    next = reinterpret_cast<const char*>(after);
                    next_bytes = std::min<int64_t>(raw, end - after) * 4 / kPoints;
                }
                for (int point = 0; point < kPoints; ++point)
                    multiply_rows<kProduct>(v + point * work.plane + sum * work.slice, work.group, u + point * plane,
                                            channels(sum) / kWords, count, sum > 0, m + point * work.product,
                                            next + point * next_bytes, next_bytes);
            }
            for (int64_t t = 0; t < count; ++t) transform_back<D, kUp>(work, first + t, panel, m + t * kPanel);
        }
    }
}

template <int D, Product kProduct>
RangeFunction range_of(bool upsample) {
    return upsample ? range<D, kProduct, true> : range<D, kProduct, false>;
}

RangeFunction range_of(const Params& p) {
    if (p.dtype == kFloat32) return range_of<kFloat32, kFloats>(p.upsample);
    if (p.dtype == kFloat16) return range_of<kFloat16, kFloats>(p.upsample);
    if (!p.pairs) return range_of<kBFloat16, kFloats>(p.upsample);
#if defined(__AVX512F__)
    if (*cpu_bfloat16()) return range_of<kBFloat16, kPairs>(p.upsample);
#endif
    return range_of<kBFloat16, kPairsByFloats>(p.upsample);
}

}  // namespace

void winograd_conv(const WinogradConvParams& params, int threads) {
    const Params& p = params;
    Work work{};
    work.p = p;
    work.rows = p.upsample ? p.height : (p.height + 1) / 2;
    work.columns = p.upsample ? p.width : (p.width + 1) / 2;
    work.parts = 1;
    work.tiles = p.batch * work.rows * work.columns;
    work.panels = (p.features + kPanel - 1) / kPanel;
    work.chunks = p.channels / (p.pairs ? 2 * kWords : kWords);
    work.sum = p.pairs ? work.chunks : work.chunks <= 2 * kSum ? work.chunks : kSum;
    const int64_t points = p.upsample ? 9 : 16, tile = points * work.chunks * kWords * 4;
    const int64_t weights = work.panels * kPanel * tile;
    // Pairs read their weights at every block of tiles: it is small, so that its numbers stay in the nearest cache,
    // unless weights come from afar. float32 weights are transformed at every block: it is large, as far as its numbers
    // fit a thread's share of the last cache.
    const int64_t most = p.pairs ? weights > kCached ? 48 : 12 : std::clamp<int64_t>(kBlock / tile, kLeast, 192);
    // A unit is a block, as many for each thread and of one size; where tiles are few, a block and a part of the
    // panels.
    const bool few = work.tiles < threads * std::min(most, kLeast);
    int64_t blocks = (work.tiles + most / kRows * kRows - 1) / (most / kRows * kRows);
    if (!few) blocks = (blocks + threads - 1) / threads * threads;
    work.block = std::min(((work.tiles + blocks - 1) / blocks + kRows - 1) / kRows * kRows, work.tiles);
    blocks = (work.tiles + work.block - 1) / work.block;
    while (few && blocks * work.parts < 4 * threads && work.parts * 2 <= work.panels) work.parts *= 2;
    work.group = work.sum * kRows * kWords;
    work.slice = (work.block + kRows - 1) / kRows * work.group;
    // An odd number of cache lines, so that the points' planes do not meet in the same sets of the cache.
    work.plane = ((work.chunks + work.sum - 1) / work.sum * work.slice / kWords | 1) * kWords;
    // The last of a block's tiles are multiplied kRows / 3 at a time, so that up to that many spare rows are written:
    // a point's products end after whole kRows, or they would be written over the next point's.
    work.product = (work.block + kRows - 1) / kRows * kRows * kPanel + kWords;
    static std::atomic<uint64_t> calls{0};
    work.call = ++calls;
    parallel_for(blocks * work.parts, 1, threads, range_of(p), &work);
}

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
