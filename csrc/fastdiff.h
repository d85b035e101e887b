// The native API: one plain struct per operation, and its CPU and CUDA entry points. This page is the table of
// contents. No tensor library is known here: pointers, sizes and strides come in, and nothing is allocated.
#pragma once

#include <stdint.h>

namespace fastdiff {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A [batch, n] view of memory: element e of sample b lies at b * batch_stride + (e / inner) * outer_stride
// + (e % inner) * inner_stride. A contiguous sample has inner = n, inner_stride = 1; channels_last has inner = H W,
// outer_stride = 1, inner_stride = C. Strides are in elements. data is null for an absent tensor.
struct View {
    void* data = nullptr;
    int dtype = kFloat32;
    int64_t batch_stride = 0, inner = 1, outer_stride = 0, inner_stride = 1;
};

// Streams of noise that are not a parameter: what add_noise draws and what inpainting adds to the known pixels.
constexpr uint32_t kAddNoiseStream = 2, kKnownNoiseStream = 3;

// Elements of a sample whose deviances are added up in one tree.
constexpr int kDevianceBlock = 1024;

// Who draws: sample b has seed seeds[b] and number samples[b], or seed and sample_offset + b where those are null.
struct NoiseKey {
    const int64_t* seeds = nullptr;
    const int64_t* samples = nullptr;
    uint64_t seed = 0;
    int64_t sample_offset = 0;
};

// out[b, e] = the normal at (seed, sample, draw, stream, e). csrc/common/normal.h
struct RandnParams {
    int64_t batch = 0, n = 0;
    View out;
    NoiseKey key;
    uint32_t draw = 0, stream = 0;
};

// out = coefficients[t, 0] x0 + coefficients[t, 1] z, with z given or drawn, and written where noise_out is set.
// A t outside [0, T) gives NaN.
struct AddNoiseParams {
    int64_t batch = 0, n = 0, T = 0;
    View x0, noise, out, noise_out;
    const float* coefficients = nullptr;  // [T, 2]: sqrt(alphas_cumprod), sqrt(1 - alphas_cumprod)
    const int64_t* timesteps = nullptr;   // [batch], or null for the one below
    int64_t timestep = 0;
    NoiseKey key;
    uint32_t draw = 0, stream = kAddNoiseStream;
};

// One row of a plan applied to the state. csrc/common/row.h has the row, fastdiff/plan/row.py the formula.
// Pointers that are not Views are contiguous float32 [batch, n], except gain [batch] and clip [batch, 2] (bound,
// scale). An output may be the input of the same name. Null means absent; noise that is needed and absent is drawn.
struct UpdateParams {
    int64_t batch = 0, n = 0;
    const float* table = nullptr;   // [rows, 48]
    int64_t row = 0;                // the row's index, unless
    const int64_t* step = nullptr;  // this points to it
    int n_outputs = 0;              // 0 to 3 network outputs; several are combined by the row's guidance weights
    View outputs[3];
    View variance;  // the conditional output's second half, under learned variance
    const float* x = nullptr;
    const float* anchor = nullptr;
    const float* slots[4] = {};
    const float* noise = nullptr;
    const float* gain = nullptr;
    const float* clip = nullptr;
    const float* gradient = nullptr;
    const float* mask = nullptr;
    const float* known = nullptr;
    const float* known_noise = nullptr;
    float* x_out = nullptr;
    float* anchor_out = nullptr;
    float* slots_out[4] = {};
    float* x0_out = nullptr;
    View model_input;
    NoiseKey key;
    int64_t* nonfinite = nullptr;  // lowered to the row's index where a network output is not finite
    // [rows, batch, ceil(n / kDevianceBlock)], written where the row draws noise: of each block of elements the sum of
    // z^2 + ln sigma^2, with the learned sigma or 1. csrc/common/row.h
    float* deviance = nullptr;
};

// A [batch, channels, pixels] tensor's memory; strides are in elements.
struct Planes {
    void* data = nullptr;
    int64_t batch_stride = 0, channel_stride = 0, pixel_stride = 0;
};

// A number a channel, for each sample or (batch_stride 0) for all; null means absent.
struct Channels {
    const void* data = nullptr;
    int dtype = kFloat32;
    int64_t batch_stride = 0;
};

// h = cat(x, x2) + add over the channels; out = (h - mean) rstd weight + bias with the statistics of each of `groups`
// equal parts of a sample's channels, rstd = 1 / sqrt(variance + eps); then out sigmoid(out) if silu.
struct GroupNormSiluParams {
    int64_t batch = 0, channels = 0, channels2 = 0, pixels = 0, groups = 1;
    int dtype = kFloat32;  // of x, x2 and out
    Planes x, x2, out;
    bool channels_last = false;  // which stride is 1 in all three: the channels' or the pixels'
    Channels weight, bias, add;
    double eps = 1e-5;
    bool silu = true;
    // The CUDA kernel's blocks, for measurements; 0 leaves them to the rule in csrc/cuda/group_norm_plan.h.
    int block_groups = 0, block_warps = 0, thread_vecs = 0;
};

// out = ((x + shift) + residual) * scale, in rows: element i of row r of sample b lies at b * batch_stride
// + r * outer_stride + i * inner_stride. A row's elements are the channels of a position (channels_last) or the
// positions of a channel. x, residual and out have one dtype; shift and residual may be absent.
struct ConvEpilogueParams {
    int64_t batch = 0, rows = 0, length = 0;
    bool channels_last = false;
    View x, residual, out;
    const float* shift = nullptr;  // channel c of sample b at b * shift_stride + c
    int64_t shift_stride = 0;
    float scale = 1;
};

// out = conv(x) + bias + residual with a 3x3 window and zeros around the image, x doubled first by its nearest
// neighbours if upsample. Images are dense and channels_last, of one dtype; bias and residual may be absent.
struct WinogradConvParams {
    int64_t batch = 0, height = 0, width = 0, channels = 0, features = 0;  // of x, and the result's channels
    int dtype = kFloat32;
    bool upsample = false;
    bool pairs = false;  // whether the products are of bfloat16 numbers, two channels a word, or of float32 ones
    const void* x = nullptr;
    const void* weights = nullptr;  // see csrc/cpu/winograd_conv.cpp
    const float* bias = nullptr;
    const void* residual = nullptr;
    void* out = nullptr;
};

// A [batch, heads, rows, channels] tensor's memory, the channels of a row side by side; strides are in elements.
struct Heads {
    void* data = nullptr;
    int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// out = softmax(scale q k^T) v, of one dtype; q and out have `queries` rows, k and v `keys`.
struct AttentionParams {
    int64_t batch = 0, heads = 0, queries = 0, keys = 0, channels = 0;
    int dtype = kFloat32;
    float scale = 1;
    Heads q, k, v, out;
};

// The operations and their parameters, once: X(name, parameters) writes the entry points below, those of each vector
// width (cpu/entry.h), the choice among them (cpu/dispatch.cpp) and the functions that Python calls (bindings.cpp).
#define FASTDIFF_CUDA_OPERATIONS(X) \
    X(randn, RandnParams)           \
    X(add_noise, AddNoiseParams)    \
    X(update, UpdateParams)         \
    X(group_norm_silu, GroupNormSiluParams)
#define FASTDIFF_OPERATIONS(X)           \
    FASTDIFF_CUDA_OPERATIONS(X)          \
    X(conv_epilogue, ConvEpilogueParams) \
    X(winograd_conv, WinogradConvParams) \
    X(attention, AttentionParams)

// <op>_cpu(params, threads), csrc/cpu/<op>.cpp; threads is an upper bound.
#define FASTDIFF_CPU_ENTRY(op, Params) void op##_cpu(const Params& params, int threads);
FASTDIFF_OPERATIONS(FASTDIFF_CPU_ENTRY)

// <op>_cuda(params, stream), csrc/cuda/<op>.cu, returns a cudaError_t. stream is a cudaStream_t of the current device.
#define FASTDIFF_CUDA_ENTRY(op, Params) int op##_cuda(const Params& params, void* stream);
FASTDIFF_CUDA_OPERATIONS(FASTDIFF_CUDA_ENTRY)

// csrc/cpu/dispatch.cpp: "avx512", "avx2" or "portable"; set_cpu_simd returns false for one that this CPU lacks.
const char* cpu_simd();
bool set_cpu_simd(const char* name);
// What this CPU multiplies bfloat16 numbers with: "matrix" (AMX), "vector" (AVX512_BF16), or "" where float32 serves.
const char* cpu_bfloat16();

}  // namespace fastdiff
