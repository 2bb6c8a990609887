// A word: one float, or two bfloat16 or four bytes that are multiplied and added together.
#pragma once

#include "arithmetic.h"

namespace {

template <typename T>
constexpr int kPack = 4 / sizeof(T);

template <typename T>
struct Summed { using Vector = Lanes; };
template <>
struct Summed<int8_t> { using Vector = Integers; };
template <typename T>
using Sum = typename Summed<T>::Vector;

template <typename T>
Sum<T> multiply_add(Sum<T> sum, uint32_t a, Words b);
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
#ifdef __AVX512VNNI__
template <>
inline Integers multiply_add<int8_t>(Integers sum, uint32_t a, Words b) {  // the bytes of b are unsigned
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, _mm512_set1_epi32(static_cast<int>(a)));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
inline Integers::Half multiply_add_half(Integers::Half sum, __m256i a, Words::Half b) {
#ifdef __AVXVNNI__
    return (Integers::Half)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)b, a);
#else  // the first of two instructions adds two products in 16 bits: int8.h sees to it that they have room there
    sum += (Integers::Half)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)b, a), _mm256_set1_epi16(1));
    asm("" : "+x"(sum));  // the compiler would add in another order, for which the registers are too few
    return sum;
#endif
}
template <>
inline Integers multiply_add<int8_t>(Integers sum, uint32_t a, Words b) {
    const __m256i factor = _mm256_set1_epi32(static_cast<int>(a));
    return {multiply_add_half(sum.low, factor, b.low), multiply_add_half(sum.high, factor, b.high)};
}
#elif defined(__ARM_FEATURE_DOTPROD)
template <typename V, typename W>
inline V multiply_add_parts(V sum, int8x16_t a, W b) {
    if constexpr (std::is_class_v<V>) return {multiply_add_parts(sum.low, a, b.low), multiply_add_parts(sum.high, a, b.high)};
    else return (V)vdotq_s32((int32x4_t)sum, (int8x16_t)b, a);
}
template <>
inline Integers multiply_add<int8_t>(Integers sum, uint32_t a, Words b) {  // all bytes are signed
    return multiply_add_parts(sum, (int8x16_t)vdupq_n_u32(a), b);
}
#endif

}  // namespace
