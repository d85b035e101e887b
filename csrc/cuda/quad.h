// A quad: the four consecutive elements of one sample that share a Philox block, and what a CUDA thread works on at a
// time. Where quads lie, how they are read and written. Host and device functions, so that a test runs them on the CPU.
#pragma once

#include "common/lane.h"
#include "common/half.h"
#include "fastdiff.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>  // __floats2bfloat162_rn
#include <cuda_fp16.h>  // __floats2half2_rn, __half22float2
#define FASTDIFF_UNROLL _Pragma("unroll")
#else
#define FASTDIFF_UNROLL
#endif

namespace fastdiff {

// The quads of a [batch, n] tensor, numbered through. Dividing a number by the quads of a sample is a multiplication
// and a shift, exact below 2^31 (Granlund & Montgomery 1994); beyond that it is a 64-bit division.
struct Grid {
    int64_t n, quads, units;  // elements and quads a sample, quads in all
    uint32_t multiplier;
    int shift;

    // With quads_multiple, a sample's quads are filled up to a multiple of it by some of a count of 0 or less.
    static Grid of(int64_t batch, int64_t n, int64_t quads_multiple = 1) {
        const int64_t quads = (n + 3) / 4;
        Grid grid{n, (quads + quads_multiple - 1) / quads_multiple * quads_multiple, 0, 0, 31};
        grid.units = batch * grid.quads;
        if (grid.units == 0 || grid.units > INT32_MAX) return grid;
        while ((int64_t{1} << (grid.shift - 31)) < grid.quads) ++grid.shift;
        grid.multiplier = static_cast<uint32_t>(((uint64_t{1} << grid.shift) + grid.quads - 1) / grid.quads);
        return grid;
    }
};

struct Quad {
    uint32_t b;       // the sample
    int count;        // 4, but for a sample's end and beyond it
    int64_t e, flat;  // the first element, in the sample and in a contiguous tensor
};

FASTDIFF_HD Quad locate(const Grid& grid, int64_t unit) {
    const uint64_t b = grid.units <= INT32_MAX ? (static_cast<uint64_t>(unit) * grid.multiplier) >> grid.shift
                                               : static_cast<uint64_t>(unit) / static_cast<uint64_t>(grid.quads);
    Quad at;
    at.b = static_cast<uint32_t>(b);
    at.e = 4 * (unit - static_cast<int64_t>(at.b) * grid.quads);
    at.flat = at.b * grid.n + at.e;
    at.count = grid.n - at.e < 4 ? static_cast<int>(grid.n - at.e) : 4;
    return at;
}

// Four lanes of row arithmetic: a term's coefficient is tested once a quad.
struct alignas(16) Float4 {
    float v[4];
};

FASTDIFF_HD Float4 operator+(Float4 a, Float4 b) {
    return {a.v[0] + b.v[0], a.v[1] + b.v[1], a.v[2] + b.v[2], a.v[3] + b.v[3]};
}
FASTDIFF_HD Float4 operator*(Float4 a, float b) { return {a.v[0] * b, a.v[1] * b, a.v[2] * b, a.v[3] * b}; }

struct Four {
    using F = Float4;
    static FASTDIFF_HD F splat(float a) { return {a, a, a, a}; }
};

// Four half-precision numbers. A NaN may come out with any payload.
struct alignas(8) Half4 {
    uint32_t v[2];
};

FASTDIFF_HD Float4 from_bfloat16(Half4 h) {
    return {bit_cast<float>(h.v[0] << 16), bit_cast<float>(h.v[0] & 0xffff0000u), bit_cast<float>(h.v[1] << 16),
            bit_cast<float>(h.v[1] & 0xffff0000u)};
}

FASTDIFF_HD Float4 from_half(Half4 h) {
#ifdef __CUDA_ARCH__
    const float2 low = __half22float2(bit_cast<__half2>(h.v[0])), high = __half22float2(bit_cast<__half2>(h.v[1]));
    return {low.x, low.y, high.x, high.y};
#else
    return {half_to_float(static_cast<uint16_t>(h.v[0])), half_to_float(static_cast<uint16_t>(h.v[0] >> 16)),
            half_to_float(static_cast<uint16_t>(h.v[1])), half_to_float(static_cast<uint16_t>(h.v[1] >> 16))};
#endif
}

FASTDIFF_HD Half4 to_bfloat16(Float4 f) {
#ifdef __CUDA_ARCH__
    return {bit_cast<uint32_t>(__floats2bfloat162_rn(f.v[0], f.v[1])),
            bit_cast<uint32_t>(__floats2bfloat162_rn(f.v[2], f.v[3]))};
#else
    return {float_to_bfloat16(f.v[0]) | static_cast<uint32_t>(float_to_bfloat16(f.v[1])) << 16,
            float_to_bfloat16(f.v[2]) | static_cast<uint32_t>(float_to_bfloat16(f.v[3])) << 16};
#endif
}

FASTDIFF_HD Half4 to_half(Float4 f) {
#ifdef __CUDA_ARCH__
    return {bit_cast<uint32_t>(__floats2half2_rn(f.v[0], f.v[1])),
            bit_cast<uint32_t>(__floats2half2_rn(f.v[2], f.v[3]))};
#else
    return {float_to_half(f.v[0]) | static_cast<uint32_t>(float_to_half(f.v[1])) << 16,
            float_to_half(f.v[2]) | static_cast<uint32_t>(float_to_half(f.v[3])) << 16};
#endif
}

// One access of 16 or 8 bytes. Stores are written in assembly, since nvcc sometimes splits the assignment of a struct,
// even of a float4, into narrower ones.
FASTDIFF_HD Float4 read16(const void* address) {
#ifdef __CUDA_ARCH__
    const float4 f = *static_cast<const float4*>(address);
    return {f.x, f.y, f.z, f.w};
#else
    return *static_cast<const Float4*>(address);
#endif
}

FASTDIFF_HD void write16(void* address, Float4 f) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "f"(f.v[0]),
                 "f"(f.v[1]), "f"(f.v[2]), "f"(f.v[3])
                 : "memory");
#else
    *static_cast<Float4*>(address) = f;
#endif
}

FASTDIFF_HD Half4 read8(const void* address) {
#ifdef __CUDA_ARCH__
    const uint2 h = *static_cast<const uint2*>(address);
    return {h.x, h.y};
#else
    return *static_cast<const Half4*>(address);
#endif
}

FASTDIFF_HD void write8(void* address, Half4 h) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "r"(h.v[0]), "r"(h.v[1])
                 : "memory");
#else
    *static_cast<Half4*>(address) = h;
#endif
}

// Whether every quad of a contiguous float32 [batch, n] is one aligned access; an absent tensor is no obstacle.
inline bool is_wide(const void* data, int64_t n) { return !data || (n % 4 == 0 && (uintptr_t)data % 16 == 0); }

// The same for a View: 16 bytes, or 8 in half precision.
inline bool is_wide(const View& v, int64_t n) {
    const uintptr_t bytes = v.dtype == kFloat32 ? 16 : 8;
    return !v.data || (v.inner == n && v.inner_stride == 1 && n % 4 == 0 && v.batch_stride % 4 == 0 &&
                       (uintptr_t)v.data % bytes == 0);
}

// A quad of a contiguous float32 [batch, n].
FASTDIFF_HD Float4 load4(const float* data, bool wide, const Quad& at) {
    data += at.flat;
    if (wide) return read16(data);
    Float4 f = {};
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i)
        if (i < at.count) f.v[i] = data[i];
    return f;
}

FASTDIFF_HD void store4(float* data, bool wide, const Quad& at, Float4 f) {
    data += at.flat;
    if (wide) {
        write16(data, f);
        return;
    }
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i)
        if (i < at.count) data[i] = f.v[i];
}

// Calls visit(i, address) for the elements of a quad, with one division for all, of 32 bits where they suffice.
template <class Visit>
FASTDIFF_HD void walk4(const View& v, const Quad& at, int64_t n, Visit visit) {
    const int64_t outer = v.inner == n      ? 0
                          : n <= UINT32_MAX ? static_cast<uint32_t>(at.e) / static_cast<uint32_t>(v.inner)
                                            : at.e / v.inner;
    int64_t inner = at.e - outer * v.inner;
    int64_t address = at.b * v.batch_stride + outer * v.outer_stride + inner * v.inner_stride;
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (i < at.count) visit(i, address);
        address += v.inner_stride;
        if (++inner == v.inner) {
            inner = 0;
            address += v.outer_stride - v.inner * v.inner_stride;
        }
    }
}

// A quad of a View as it lies in memory: the first eight bytes of the result hold half precision. widen() makes float32
// of it. These are two steps so that a thread has all its loads on their way before it waits for one of them.
// kWide promises is_wide(v, n).
template <bool kWide>
FASTDIFF_HD Float4 load_raw4(const View& v, const Quad& at, int64_t n) {
    Float4 raw = {};
    if (kWide) {
        const int64_t address = at.b * v.batch_stride + at.e;
        if (v.dtype == kFloat32) return read16(static_cast<const float*>(v.data) + address);
        const Half4 h = read8(static_cast<const uint16_t*>(v.data) + address);
        raw.v[0] = bit_cast<float>(h.v[0]);
        raw.v[1] = bit_cast<float>(h.v[1]);
        return raw;
    }
    if (v.dtype == kFloat32) {
        walk4(v, at, n, [&](int i, int64_t address) { raw.v[i] = static_cast<const float*>(v.data)[address]; });
        return raw;
    }
    uint16_t h[4] = {};
    walk4(v, at, n, [&](int i, int64_t address) { h[i] = static_cast<const uint16_t*>(v.data)[address]; });
    raw.v[0] = bit_cast<float>(h[0] | static_cast<uint32_t>(h[1]) << 16);
    raw.v[1] = bit_cast<float>(h[2] | static_cast<uint32_t>(h[3]) << 16);
    return raw;
}

FASTDIFF_HD Float4 widen(Float4 raw, int dtype) {
    if (dtype == kFloat32) return raw;
    const Half4 h = {bit_cast<uint32_t>(raw.v[0]), bit_cast<uint32_t>(raw.v[1])};
    return dtype == kBFloat16 ? from_bfloat16(h) : from_half(h);
}

template <bool kWide>
FASTDIFF_HD Float4 load4(const View& v, const Quad& at, int64_t n) {
    return widen(load_raw4<kWide>(v, at, n), v.dtype);
}

template <bool kWide>
FASTDIFF_HD void store4(const View& v, const Quad& at, int64_t n, Float4 f) {
    if (v.dtype == kFloat32) {
        if (kWide)
            write16(static_cast<float*>(v.data) + at.b * v.batch_stride + at.e, f);
        else
            walk4(v, at, n, [&](int i, int64_t address) { static_cast<float*>(v.data)[address] = f.v[i]; });
        return;
    }
    const Half4 h = v.dtype == kBFloat16 ? to_bfloat16(f) : to_half(f);
    if (kWide)
        write8(static_cast<uint16_t*>(v.data) + at.b * v.batch_stride + at.e, h);
    else
        walk4(v, at, n, [&](int i, int64_t address) {
            static_cast<uint16_t*>(v.data)[address] = static_cast<uint16_t>(h.v[i / 2] >> 16 * (i % 2));
        });
}

}  // namespace fastdiff
