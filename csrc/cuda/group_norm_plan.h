// Which group normalisations group_norm_silu.cu serves, and the shape of their blocks. No CUDA is needed here.
//
// A block holds whole groups of one sample, so that it needs no other block's sums: of every pixel a chunk of `groups`
// groups' channels, which is a number of 16-byte vectors. A warp takes `rows` pixels at a time, lane = pixel * vectors
// + vector, and a thread `vecs` vectors, rows * warps pixels apart: all have the same channels. A piece is the part of
// a vector that lies in one group.
#pragma once

#include "fastdiff.h"

namespace fastdiff {

constexpr int kVectorBytes = 16, kSectorBytes = 32;  // what a thread and what a GPU's memory reads at least
// Vectors of a thread, which fill 32 registers.
constexpr int kMostVecs = 8;
constexpr int kMostWidth = 256;    // channels of a chunk: of a warp's 32 lanes, each with 8 half-precision numbers
constexpr int kMostPieces = 4;     // of a vector: each piece has a mean and sums in registers of its own
constexpr int kPartials = 512;     // floats of shared memory for a sum's parts: a warp's, of each piece
constexpr int kMostWarps = 16;     // in a block of up to 4 vectors a thread,
constexpr int kMostWarpsOf8 = 24;  // and of 8, which take up to 80 registers: kRegisters in group_norm_silu.cu

struct GroupNormPlan {
    const char* refusal = nullptr;  // why no block can be formed; then nothing below counts
    int size = 0;                   // channels of a group
    int pieces = 0;                 // of a vector
    int groups = 0, vectors = 0;    // of a chunk
    int rows = 0, warps = 0, vecs = 0;
};

inline int element_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// The block for chunks of `groups` groups; 0 warps or vecs leaves them to the rule: the most vecs that leave a block of
// at least four warps, for a thread pays for the reductions once, whatever it holds.
inline GroupNormPlan plan_block(const GroupNormSiluParams& p, int groups, int warps, int vecs) {
    GroupNormPlan plan;
    const int per = kVectorBytes / element_bytes(p.dtype);
    const auto refuse = [&plan](const char* why) {
        plan.refusal = why;
        return plan;
    };
    plan.size = static_cast<int>((p.channels + p.channels2) / p.groups);
    int granule = per;  // channels of a piece: the gcd of the group's size and the vector's, a power of two
    while (plan.size % granule != 0) granule /= 2;
    plan.pieces = per / granule;
    if (plan.pieces > kMostPieces || granule == 1) return refuse("a group has an odd number of channels");
    if (groups < 1 || groups > 32 || p.groups % groups != 0 || groups * plan.size % per != 0)
        return refuse("no number of groups fills vectors of 16 bytes");
    plan.groups = groups;
    plan.vectors = groups * plan.size / per;
    if (plan.vectors > 32) return refuse("a pixel's share of a group is more than 512 bytes");
    plan.rows = 32 / plan.vectors;
    const auto warps_for = [&](int v) { return (p.pixels + int64_t{plan.rows} * v - 1) / (int64_t{plan.rows} * v); };
    if (vecs == 0 && warps != 0) {
        for (vecs = 1; vecs < kMostVecs && warps_for(vecs) > warps;) vecs *= 2;
    } else if (vecs == 0) {
        for (vecs = kMostVecs; vecs > 1 && warps_for(vecs) < 4;) vecs /= 2;
    }
    if (vecs != 1 && vecs != 2 && vecs != 4 && vecs != 8) return refuse("vecs must be 1, 2, 4 or 8");
    const int64_t wanted = warps_for(vecs), most = vecs == 8 ? kMostWarpsOf8 : kMostWarps;
    if (wanted > (warps != 0 ? warps : most) || warps > most) return refuse("a group is too large for one block");
    plan.vecs = vecs;
    plan.warps = warps != 0 ? warps : static_cast<int>(wanted);
    if (plan.warps * plan.vectors * plan.pieces > kPartials) return refuse("a group is too large for one block");
    return plan;
}

// The groups of a block: the fewest whose chunk is whole sectors, of at most 64 KiB a block; else the fewest that fill
// a sector, else the fewest. The choice knows no batch, so that a sample's bits do not depend on it. Fields of p that
// are not 0 force theirs.
inline GroupNormPlan plan_group_norm(const GroupNormSiluParams& p) {
    const auto refuse = [](const char* why) {
        GroupNormPlan plan;
        plan.refusal = why;
        return plan;
    };
    const int64_t bytes = element_bytes(p.dtype), channels = p.channels + p.channels2;
    const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0; };
    const auto whole = [bytes](int64_t stride, int64_t b) { return stride * b % kVectorBytes == 0; };
    if (!p.channels_last) return refuse("its layout is not channels_last");
    if (p.pixels > (1 << 20) || channels / p.groups > 256) return refuse("a group is too large for one block");
    for (const Planes* t : {&p.x, &p.x2, &p.out}) {
        if (!t->data) continue;
        if (!aligned(t->data)) return refuse("a tensor does not begin at a multiple of 16 bytes");
        if (!whole(p.batch > 1 ? t->batch_stride : 0, bytes) || !whole(p.pixels > 1 ? t->pixel_stride : 0, bytes))
            return refuse("a tensor's pixels are not a multiple of 16 bytes apart");
    }
    if (!whole(p.channels, bytes)) return refuse("x's channels are not a multiple of 16 bytes");
    for (const Channels* t : {&p.weight, &p.bias, &p.add})
        if (t->data && (!aligned(t->data) || !whole(t->batch_stride, element_bytes(t->dtype))))
            return refuse("weight, bias or add does not begin at a multiple of 16 bytes");
    if (p.block_groups != 0) return plan_block(p, p.block_groups, p.block_warps, p.thread_vecs);
    GroupNormPlan best, plan;
    int rank = 0;
    for (int groups = 1; groups <= 32 && groups <= p.groups; ++groups) {
        plan = plan_block(p, groups, p.block_warps, p.thread_vecs);
        if (plan.refusal) {
            if (!best.refusal && rank == 0) best = plan;
            continue;
        }
        const int chunk = plan.vectors * kVectorBytes;
        const int now = chunk % kSectorBytes == 0 && p.pixels * chunk <= 65536 ? 3 : chunk >= kSectorBytes ? 2 : 1;
        if (now > rank) best = plan, rank = now;
    }
    return best;
}

}  // namespace fastdiff
