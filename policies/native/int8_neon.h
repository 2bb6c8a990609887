// Rotating by Hadamard matrices and rounding to bytes, by NEON.
#pragma once

#include "int8.h"

#ifdef BYTES_BY_NEON

namespace {

// a + b in the lower and a - b in the higher of each pair of places
inline Eight::Half hadamard_of_register(Eight::Half a) {
    a = (Eight::Half)vrev64q_f32((float32x4_t)a) + a * Eight::Half{1, -1, 1, -1};
    return (Eight::Half)vextq_f32((float32x4_t)a, (float32x4_t)a, 2) + a * Eight::Half{1, 1, -1, -1};
}

inline int16x8_t round_to_shorts(Eight x, Integers::Half& numbers) {
    const int32x4_t low = vcvtnq_s32_f32((float32x4_t)x.low), high = vcvtnq_s32_f32((float32x4_t)x.high);
    numbers = {(Integers::Half::Half)low, (Integers::Half::Half)high};
    return vcombine_s16(vqmovn_s32(low), vqmovn_s32(high));
}

// Numbers as the nearest bytes, ties to even; the numbers.
inline Integers round_to_bytes(Lanes x, int8_t* to) {
    Integers numbers;
    const int16x8_t low = round_to_shorts(x.low, numbers.low), high = round_to_shorts(x.high, numbers.high);
    vst1q_s8(to, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
    return numbers;
}

}  // namespace
#endif
