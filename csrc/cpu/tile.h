// Tiles of V vectors of consecutive elements in one of the three dtypes: bfloat16 in pairs, a rectangle's end in part.
#pragma once

#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_SIMD {

using F = Simd::F;

// Whether the vectors of a tile are taken in pairs: of 2 W consecutive bfloat16 numbers the even ones and the odd ones,
// which are then the halves of W words, so that no instruction moves numbers between lanes.
template <int D, int V>
constexpr bool kPaired = D == kBFloat16 && V % 2 == 0;

// The lane, as memory has them, of a tile's element i.
template <int D, int V>
constexpr int lane_of(int i) {
    if (!kPaired<D, V>) return i;
    return i / (2 * W) * (2 * W) + 2 * (i % W) + i / W % 2;
}

// The V vectors of elements from `at`; in the last of a rectangle (kPart) `count` elements and zeros.
template <int D, int V, bool kPart>
FASTDIFF_HD void load_tile(const void* data, int64_t at, int count, Simd::F (&x)[V]) {
    View view;
    view.dtype = D;
    if (kPaired<D, V>) {
        for (int v = 0; v < V; v += 2) {
            Simd::U words;
            memcpy(&words, static_cast<const uint16_t*>(data) + at + v * W, sizeof(words));
            x[v] = bit_cast<Simd::F>(words << 16);
            x[v + 1 < V ? v + 1 : v] = bit_cast<Simd::F>(words & 0xffff0000u);
        }
        return;
    }
    if (kPart) {
        char buffer[W * 4] = {};
        constexpr int size = D == kFloat32 ? 4 : 2;
        memcpy(buffer, static_cast<const char*>(data) + at * size, count * size);
        view.data = buffer;
        x[0] = load_dense(view, 0);
        return;
    }
    view.data = const_cast<void*>(data);
    for (int v = 0; v < V; ++v) x[v] = load_dense(view, at + v * W);
}

template <int D, int V, bool kPart>
FASTDIFF_HD void store_tile(void* data, int64_t at, int count, const Simd::F (&x)[V]) {
    View view;
    view.dtype = D;
    if (kPaired<D, V>) {
        for (int v = 0; v < V; v += 2) {
            // NaN is not treated apart: one with a lower half that is not 0 could round to an infinity or a zero. A NaN
            // that comes here must have zeros there, or be the usual one.
            const Simd::U odd = round_to_bfloat16(bit_cast<Simd::U>(x[v + 1 < V ? v + 1 : v]));
            const Simd::U words = (round_to_bfloat16(bit_cast<Simd::U>(x[v])) >> 16) | (odd & 0xffff0000u);
            memcpy(static_cast<uint16_t*>(data) + at + v * W, &words, sizeof(words));
        }
        return;
    }
    if (kPart) {
        char buffer[W * 4];
        constexpr int size = D == kFloat32 ? 4 : 2;
        view.data = buffer;
        store_dense(view, 0, x[0]);
        memcpy(static_cast<char*>(data) + at * size, buffer, count * size);
        return;
    }
    view.data = data;
    for (int v = 0; v < V; ++v) store_dense(view, at + v * W, x[v]);
}

template <int V, bool kPart>
struct Tile {
    static constexpr int vectors = V;
    static constexpr bool part = kPart;
};

constexpr int kTile = 4;           // vectors of the widest tile
constexpr int kLanes = kTile * W;  // and its lanes

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

}  // namespace FASTDIFF_SIMD
}  // namespace fastdiff
