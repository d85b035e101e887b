// What a block of group_norm_silu.cu is made of: its launch, what a thread does alone, and the sums over its warps.
#pragma once

#include <cuda_runtime.h>

#include "cuda/group_norm_plan.h"
#include "cuda/quad.h"  // Float4, from_bfloat16, to_bfloat16, from_half, to_half

namespace fastdiff {

// A tensor in bytes.
struct Rows {
    char* data;
    int64_t batch, pixel, step;  // to the next sample, pixel, and a thread's next vector
};

struct GroupNormLaunch {
    GroupNormPlan plan;
    Rows x, x2, out;
    Channels weight, bias, add;
    int batch, pixels, channels;              // of x, without x2's
    int pieces_of_group;                      // in a pixel
    int group_lanes;                          // log2 of the lanes that add up a group
    uint32_t by_vectors, by_pieces, by_size;  // divide()'s multipliers: plan.vectors, pieces_of_group, plan.size
    uint32_t zero;                            // optimisation_barrier()'s
    bool silu;
    double eps;
    float first_pixels, per_first;  // the pixels that the first mean is of; 1 / elements of those in a group
    float per_element;              // 1 / elements of a group
};

#ifdef __CUDACC__
#define FASTDIFF_ROLLED _Pragma("unroll 1")
#else
#define FASTDIFF_ROLLED
#endif

constexpr unsigned kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------------------
// what a thread does alone

// a / d for a and d up to 256, with multiplier = ceil(2^16 / d) (Granlund & Montgomery 1994)
FASTDIFF_HD int divide(int a, uint32_t multiplier) { return static_cast<int>(a * multiplier >> 16); }
inline uint32_t multiplier_of(int d) { return (65535u + d) / d; }

// Elements 4 q to 4 q + 3 of a vector of kPer elements.
template <int kDType>
constexpr int kPer = kDType == kFloat32 ? 4 : 8;

template <int kDType>
FASTDIFF_HD Float4 widen(const Float4& raw, int q) {
    if constexpr (kDType == kFloat32) return raw;
    const Half4 four = {bit_cast<uint32_t>(raw.v[2 * q]), bit_cast<uint32_t>(raw.v[2 * q + 1])};
    return kDType == kBFloat16 ? from_bfloat16(four) : from_half(four);
}

template <int kDType>
FASTDIFF_HD void narrow(Float4& raw, int q, const Float4& y) {
    if constexpr (kDType == kFloat32) {
        raw = y;
    } else {
        const Half4 four = kDType == kBFloat16 ? to_bfloat16(y) : to_half(y);
        raw.v[2 * q] = bit_cast<float>(four.v[0]);
        raw.v[2 * q + 1] = bit_cast<float>(four.v[1]);
    }
}

// Makes the compiler widen a half-precision vector again in each pass over it. It would otherwise keep the widened
// numbers from one pass to the next, in twice the registers. An exclusive-or with a zero that it does not know to be
// one stops that.
template <int kDType>
FASTDIFF_HD void optimisation_barrier(Float4& raw, uint32_t zero) {
    if constexpr (kDType != kFloat32) {
        FASTDIFF_UNROLL
        for (float& word : raw.v) word = bit_cast<float>(bit_cast<uint32_t>(word) ^ zero);
    }
}

// Reads four numbers of shared memory anew each time. Without `volatile` the compiler would read a vector's constants
// once and keep them in registers over the whole loop.
FASTDIFF_HD Float4 read_shared(const Float4& from) {
#ifdef __CUDA_ARCH__
    Float4 f;
    asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(f.v[0]), "=f"(f.v[1]), "=f"(f.v[2]), "=f"(f.v[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(&from))));
    return f;
#else
    return from;
#endif
}

// y / (1 + e^-y). Half precision takes the approximations, of about 2 ulp of float32.
template <int kDType>
FASTDIFF_HD float silu(float y) {
#ifdef __CUDA_ARCH__
    if constexpr (kDType != kFloat32) {
        float e, inverse;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y * -1.4426950408889634f));
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + e));
        return y * inverse;
    }
#endif
    return y / (1.0f + expf(-y));
}

template <int kDType>
FASTDIFF_HD float load_channel(const Channels& from, int64_t b, int channel, float absent) {
    if (!from.data) return absent;
    const int64_t at = b * from.batch_stride + channel;
    if (from.dtype == kFloat32) return static_cast<const float*>(from.data)[at];
    const Half4 four = {static_cast<const uint16_t*>(from.data)[at], 0};
    return (kDType == kBFloat16 ? from_bfloat16(four) : from_half(four)).v[0];
}

// ---------------------------------------------------------------------------------------------------------------------
// sums over a block, in an order that depends on nothing but its shape

// Leaves the sums over a warp's pixels with the lanes of its first pixel. Pixels need not be a power of two: of an odd
// number one waits for the next round. Lanes without a pixel take part, since a shuffle waits for all that it names.
template <int kCount>
__device__ __forceinline__ void sum_rows(const GroupNormPlan& plan, int row, float (&v)[kCount]) {
    FASTDIFF_ROLLED
    for (int n = plan.rows; n > 1;) {
        const int half = (n + 1) / 2;
        FASTDIFF_UNROLL
        for (int j = 0; j < kCount; ++j) {
            const float other = __shfl_down_sync(kAllLanes, v[j], half * plan.vectors);
            if (row + half < n) v[j] += other;
        }
        n = half;
    }
}

// Writes a warp's sums of a vector's pieces to the partial sums, [groups][warps][pieces of a group]. `piece` counts
// from the chunk's first group: group * pieces_of_group is in it already, and so one warp fewer is counted.
template <int kPieces>
__device__ __forceinline__ void write_partials(const GroupNormLaunch& u, int vector, int warp, const float* sums,
                                               float* parts) {
    FASTDIFF_UNROLL
    for (int j = 0; j < kPieces; ++j) {
        const int piece = vector * kPieces + j, group = divide(piece, u.by_pieces);
        parts[(group * (u.plan.warps - 1) + warp) * u.pieces_of_group + piece] = sums[j];
    }
}

// Group g's total, with all lanes of lane >> group_lanes = g, from the partial sums that the warps wrote. Every warp
// adds the same numbers in the same order, so that no barrier is needed to hand totals from one warp to the others.
__device__ __forceinline__ float sum_parts(const GroupNormLaunch& u, int lane, const float* parts) {
    const int lanes = 1 << u.group_lanes, group = lane >> u.group_lanes;
    const int count = u.plan.warps * u.pieces_of_group;
    float total = 0;
    if (group < u.plan.groups) FASTDIFF_ROLLED
    for (int k = lane & (lanes - 1); k < count; k += lanes) total += parts[group * count + k];
    FASTDIFF_ROLLED
    for (int offset = lanes / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
    return total;
}

// The sum of what is added to a pixel of group lane >> group_lanes.
__device__ __forceinline__ float sum_adds(const GroupNormLaunch& u, int lane, const float* adds) {
    const int lanes = 1 << u.group_lanes, group = lane >> u.group_lanes;
    float total = 0;
    if (group < u.plan.groups) FASTDIFF_ROLLED
    for (int c = lane & (lanes - 1); c < u.plan.size; c += lanes) total += adds[group * u.plan.size + c];
    FASTDIFF_ROLLED
    for (int offset = lanes / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
    return total;
}

// 1 / sqrt(variance + eps) from the sum of the squared deviations and their mean. For float32 it is computed in double:
// float32's roundings would show in the result, those of half precision hide them.
template <int kDType>
__device__ __forceinline__ float reciprocal_deviation(const GroupNormLaunch& u, float squares, float off) {
    if constexpr (kDType == kFloat32) {
        const double variance =
            squares / (static_cast<double>(u.pixels) * u.plan.size) - static_cast<double>(off) * off;
        return static_cast<float>(1.0 / sqrt(fmax(variance, 0.0) + u.eps));
    }
    return 1.0f / sqrtf(fmaxf(squares * u.per_element - off * off, 0.0f) + static_cast<float>(u.eps));
}

// A number of a piece's group, from the lanes that added it up.
__device__ __forceinline__ float of_group(const GroupNormLaunch& u, int piece, float number) {
    return __shfl_sync(kAllLanes, number, divide(piece, u.by_pieces) << u.group_lanes);
}

}  // namespace fastdiff
