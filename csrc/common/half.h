// float32 to and from bfloat16 and float16, rounding to nearest even, for the elements that no vector instruction
// takes.
#pragma once

#include "common/lane.h"

namespace fastdiff {

FASTDIFF_HD float bfloat16_to_float(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// The bits of float32 numbers (a uint32_t or a vector of them) rounded to their upper halves. A NaN must be treated
// apart: one whose bits are all ones would round to a zero.
template <class U>
FASTDIFF_HD U round_to_bfloat16(U bits) {
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

FASTDIFF_HD uint16_t float_to_bfloat16(float f) {
    if (f != f) return 0x7fc0;
    return static_cast<uint16_t>(round_to_bfloat16(bit_cast<uint32_t>(f)) >> 16);
}

FASTDIFF_HD float half_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest >= 0x0400u) return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
    const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24, exact
    return sign ? -small : small;
}

FASTDIFF_HD uint16_t float_to_half(float f) {
    const uint32_t bits = bit_cast<uint32_t>(f), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
    if (size < 0x38800000u) {
        // Below 2^-14 the spacing is 2^-24: adding 1/2, whose spacing that is, rounds; its low bits are the answer.
        const float shifted = bit_cast<float>(size) + 0.5f;
        return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13));
}

}  // namespace fastdiff
