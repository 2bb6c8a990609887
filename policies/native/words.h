// A word: one float, or two bfloat16 that are multiplied and added together.
#pragma once

#include "arithmetic.h"

namespace {

template <typename T>
constexpr int kPack = 4 / sizeof(T);

template <typename T>
Lanes multiply_add(Lanes sum, uint32_t a, Words b);
template <>
inline Lanes multiply_add<float>(Lanes sum, uint32_t a, Words b) {
    return sum + bits_to_float(a) * (Lanes)b;
}
template <>
inline Lanes multiply_add<bf16>(Lanes sum, uint32_t a, Words b) {
#ifdef __AVX512BF16__
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
#else
    return sum + bits_to_float(a << 16) * (Lanes)(b << 16) + bits_to_float(a & 0xffff0000u) * (Lanes)(b & 0xffff0000u);
#endif
}

}  // namespace
