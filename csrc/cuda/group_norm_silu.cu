// Group normalisation, and SiLU, of channels_last tensors whose groups fit in a block's registers: x is read once, all
// of it before its first use, and stays packed as it came. group_norm_plan.h has the blocks' shape.
#include <cuda_runtime.h>

#include "cuda/group_norm_block.h"
#include "cuda/quad.h"  // read16, write16

namespace fastdiff {

namespace {

constexpr unsigned kMostGridY = 65535;  // CUDA's limit; a larger batch goes on in z

// Registers of a thread: the fewest with which ptxas spills nothing. The bounds below, on a block's threads and on the
// blocks of a multiprocessor, are what leaves every thread so many of its 65536.
template <int kDType, int kVecs, int kPieces, bool kAdds>
constexpr int kRegisters = kVecs == 8   ? (kPieces == 4 || kAdds || kDType == kFloat32 ? 80 : 64)
                           : kVecs == 4 ? (kPieces == 4 || kAdds || kDType == kFloat32 ? 64 : 48)
                                        : 40;
constexpr int bound_threads(int registers, bool large) {
    return registers == 80 ? 768 : registers == 48 ? 640 : large ? 1024 : 512;
}
constexpr int bound_blocks(int registers, bool large) { return large ? 1 : registers == 40 ? 3 : 2; }
static_assert(32 * kMostWarps <= 512 && 32 * kMostWarpsOf8 <= 768, "a block has no more threads than its bound");

// Vectors of a thread that the first mean is of.
template <int kDType, int kVecs>
constexpr int kFirst = kDType == kFloat32 ? kVecs : 1;

template <int kDType, int kVecs, int kPieces, bool kAdds, int kMax = kRegisters<kDType, kVecs, kPieces, kAdds>>
__global__ void __launch_bounds__(bound_threads(kMax, kVecs == 8), bound_blocks(kMax, kVecs == 8))
    group_norm_silu_kernel(const __grid_constant__ GroupNormLaunch u) {
    constexpr int kWidth = kPer<kDType>, kFours = kWidth / 4, kGranule = kWidth / kPieces, kBytes = 16 / kWidth;
    // Three arrays of partial sums: a warp may write the next ones while another still reads the last.
    __shared__ float parts[3][kPartials];
    __shared__ Float4 shared_add[kMostWidth / 4], shared_scale[kMostWidth / 4], shared_shift[kMostWidth / 4];
    const GroupNormPlan& plan = u.plan;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = divide(lane, u.by_vectors), vector = lane - row * plan.vectors;
    const int b = static_cast<int>(blockIdx.y + blockIdx.z * kMostGridY), chunk = static_cast<int>(blockIdx.x);
    // The whole block leaves, so that none of its threads waits for others at a barrier.
    if (b >= u.batch) return;
    const int width = plan.groups * plan.size;  // channels of the chunk
    const int channel = chunk * width + vector * kWidth;
    // A warp's last lanes have no pixel where 32 is no multiple of its vectors.
    const int step = plan.warps * plan.rows, first = row < plan.rows ? warp * plan.rows + row : u.pixels;
    const auto inside = [&](int i) { return first + i * step < u.pixels; };

    const bool second = channel >= u.channels;
    const Rows& from = second ? u.x2 : u.x;
    const char* source = from.data + b * from.batch + static_cast<uint32_t>(first) * from.pixel +
                         kBytes * (second ? channel - u.channels : channel);
    // All loads are on their way before the first sum waits for one.
    Float4 raw[kVecs];
    FASTDIFF_UNROLL
    for (int i = 0; i < kVecs; ++i) {
        raw[i] = {};
        if (inside(i)) raw[i] = read16(source);
        source += from.step;
    }
    float* const adds = shared_add[0].v;
    float* const scales = shared_scale[0].v;
    float* const shifts = shared_shift[0].v;
    FASTDIFF_ROLLED
    for (int c = threadIdx.x; c < width; c += 32 * plan.warps) {
        if (kAdds) adds[c] = load_channel<kDType>(u.add, b, chunk * width + c, 0);
        scales[c] = load_channel<kDType>(u.weight, 0, chunk * width + c, 1);
        shifts[c] = load_channel<kDType>(u.bias, 0, chunk * width + c, 0);
    }

    // A first mean, near the group's own. What it is off by is the mean of the deviations from it, and is corrected
    // below. In half precision each thread's first vector is enough: that mean is at most sqrt(kVecs - 1) standard
    // deviations off, and the other vectors are still on their way.
    float sums[kPieces] = {};
    FASTDIFF_UNROLL
    for (int i = 0; i < kFirst<kDType, kVecs>; ++i) {
        FASTDIFF_UNROLL
        for (int c = 0; c < kWidth; ++c) sums[c / kGranule] += widen<kDType>(raw[i], c / 4).v[c % 4];
    }
    sum_rows(plan, row, sums);
    if (row == 0) write_partials<kPieces>(u, vector, warp, sums, parts[0]);
    __syncthreads();
    FASTDIFF_UNROLL
    for (Float4& vector : raw) optimisation_barrier<kDType>(vector, u.zero);
    float total = sum_parts(u, lane, parts[0]);
    if (kAdds) total += u.first_pixels * sum_adds(u, lane, adds);
    float mean[kPieces];
    FASTDIFF_UNROLL
    for (int j = 0; j < kPieces; ++j) mean[j] = of_group(u, vector * kPieces + j, total * u.per_first);

    float deviations[2 * kPieces] = {};  // their sums, and those of their squares
    FASTDIFF_UNROLL
    for (int i = 0; i < kVecs; ++i) {
        if (!inside(i)) break;
        FASTDIFF_UNROLL
        for (int q = 0; q < kFours; ++q) {
            Float4 h = widen<kDType>(raw[i], q);
            if (kAdds) h = h + read_shared(shared_add[vector * kFours + q]);
            FASTDIFF_UNROLL
            for (int k = 0; k < 4; ++k) {
                const int j = (4 * q + k) / kGranule;
                const float d = h.v[k] - mean[j];
                deviations[j] += d;
                deviations[kPieces + j] += d * d;
            }
        }
    }
    sum_rows(plan, row, deviations);
    if (row == 0) {
        write_partials<kPieces>(u, vector, warp, deviations, parts[1]);
        write_partials<kPieces>(u, vector, warp, deviations + kPieces, parts[2]);
    }
    __syncthreads();
    // y = (h - mean - off) rstd weight + bias, whose constants of a channel are computed once, by one thread. The warps
    // whose lanes have no channel wait at the next barrier.
    if (warp * 32 < width) {
        const float off = sum_parts(u, lane, parts[1]) * u.per_element;
        const float rstd = reciprocal_deviation<kDType>(u, sum_parts(u, lane, parts[2]), off);
        FASTDIFF_ROLLED
        for (int begin = warp * 32; begin < width; begin += 32 * plan.warps) {
            const int c = begin + lane, group = divide(c < width ? c : 0, u.by_size);
            const float off_c = __shfl_sync(kAllLanes, off, group << u.group_lanes);
            const float rstd_c = __shfl_sync(kAllLanes, rstd, group << u.group_lanes);
            if (c < width) {
                scales[c] *= rstd_c;
                shifts[c] -= off_c * scales[c];
            }
        }
    }
    __syncthreads();
    FASTDIFF_UNROLL
    for (Float4& vector : raw) optimisation_barrier<kDType>(vector, u.zero);
    char* to = u.out.data + b * u.out.batch + static_cast<uint32_t>(first) * u.out.pixel + kBytes * channel;
    FASTDIFF_UNROLL
    for (int i = 0; i < kVecs; ++i) {
        if (!inside(i)) break;
        Float4 result;
        FASTDIFF_UNROLL
        for (int q = 0; q < kFours; ++q) {
            Float4 h = widen<kDType>(raw[i], q);
            if (kAdds) h = h + read_shared(shared_add[vector * kFours + q]);
            const Float4 scale = read_shared(shared_scale[vector * kFours + q]);
            const Float4 shift = read_shared(shared_shift[vector * kFours + q]);
            FASTDIFF_UNROLL
            for (int k = 0; k < 4; ++k) {
                const float y = (h.v[k] - mean[(4 * q + k) / kGranule]) * scale.v[k] + shift.v[k];
                h.v[k] = u.silu ? silu<kDType>(y) : y;
            }
            narrow<kDType>(result, q, h);
        }
        write16(to, result);
        to += u.out.step;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// launcher

using Kernel = void (*)(const GroupNormLaunch);

template <int kDType, int kVecs, int kPieces>
Kernel kernel_for(bool adds) {
    return adds ? group_norm_silu_kernel<kDType, kVecs, kPieces, true>
                : group_norm_silu_kernel<kDType, kVecs, kPieces, false>;
}

template <int kDType, int kVecs>
Kernel kernel_for(int pieces, bool adds) {
    if (pieces == 1) return kernel_for<kDType, kVecs, 1>(adds);
    if (pieces == 2) return kernel_for<kDType, kVecs, 2>(adds);
    if constexpr (kDType == kFloat32)
        return nullptr;  // four pieces of a float32 vector would be single channels, which plan_block refuses
    else
        return kernel_for<kDType, kVecs, 4>(adds);
}

template <int kDType>
Kernel kernel_for(const GroupNormPlan& plan, bool adds) {
    switch (plan.vecs) {
        case 1:
            return kernel_for<kDType, 1>(plan.pieces, adds);
        case 2:
            return kernel_for<kDType, 2>(plan.pieces, adds);
        case 4:
            return kernel_for<kDType, 4>(plan.pieces, adds);
        default:
            return kernel_for<kDType, 8>(plan.pieces, adds);
    }
}

}  // namespace

int group_norm_silu_cuda(const GroupNormSiluParams& p, void* stream) {
    GroupNormLaunch u = {};
    u.plan = plan_group_norm(p);
    if (u.plan.refusal) return cudaErrorInvalidValue;
    if (p.batch > INT32_MAX) return cudaErrorInvalidConfiguration;
    const int64_t step = u.plan.warps * u.plan.rows, bytes = element_bytes(p.dtype);
    const auto rows = [&](const Planes& t) {
        const int64_t pixel = bytes * t.pixel_stride;
        return Rows{static_cast<char*>(t.data), bytes * t.batch_stride, pixel, step * pixel};
    };
    u.x = rows(p.x), u.x2 = rows(p.x2), u.out = rows(p.out);
    u.weight = p.weight, u.bias = p.bias, u.add = p.add;
    u.batch = static_cast<int>(p.batch), u.pixels = static_cast<int>(p.pixels);
    u.channels = static_cast<int>(p.channels);
    u.pieces_of_group = u.plan.vectors * u.plan.pieces / u.plan.groups;
    u.group_lanes = 5;  // a warp adds up all groups of a chunk at once, each with the same number of lanes
    while ((32 >> u.group_lanes) < u.plan.groups) --u.group_lanes;
    u.by_vectors = multiplier_of(u.plan.vectors);
    u.by_pieces = multiplier_of(u.pieces_of_group);
    u.by_size = multiplier_of(u.plan.size);
    u.silu = p.silu;
    u.eps = p.eps;
    const int64_t first = p.dtype == kFloat32 || p.pixels < step ? p.pixels : step;
    u.first_pixels = static_cast<float>(first);
    u.per_first = static_cast<float>(1.0 / (static_cast<double>(first) * u.plan.size));
    u.per_element = static_cast<float>(1.0 / (static_cast<double>(p.pixels) * u.plan.size));
    const bool adds = p.add.data != nullptr;
    const Kernel kernel = p.dtype == kFloat32    ? kernel_for<kFloat32>(u.plan, adds)
                          : p.dtype == kBFloat16 ? kernel_for<kBFloat16>(u.plan, adds)
                                                 : kernel_for<kFloat16>(u.plan, adds);
    cudaLaunchConfig_t config = {};
    const unsigned chunks = static_cast<unsigned>(p.groups / u.plan.groups), batch = static_cast<unsigned>(p.batch);
    config.gridDim =
        batch <= kMostGridY ? dim3(chunks, batch) : dim3(chunks, kMostGridY, (batch + kMostGridY - 1) / kMostGridY);
    config.blockDim = dim3(static_cast<unsigned>(32 * u.plan.warps));
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, u);
}

}  // namespace fastdiff
