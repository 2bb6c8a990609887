// Rotating by Hadamard matrices and rounding to bytes, by AVX-512.
#pragma once

#include "int8.h"

#ifdef BYTES_BY_AVX512

namespace {

// a + b in the lower lanes and a - b in the higher ones of each pair of `swapped` lanes
inline Lanes butterfly(Lanes x, __m512 swapped, __mmask16 higher) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return (Lanes)_mm512_fmadd_ps((__m512)x, _mm512_mask_sub_ps(one, higher, _mm512_setzero_ps(), one), swapped);
}

inline Lanes hadamard_of_register(Lanes a) {
    a = butterfly(a, _mm512_permute_ps((__m512)a, 0xb1), 0xaaaa);
    a = butterfly(a, _mm512_permute_ps((__m512)a, 0x4e), 0xcccc);
    a = butterfly(a, _mm512_shuffle_f32x4((__m512)a, (__m512)a, 0xb1), 0xf0f0);
    return butterfly(a, _mm512_shuffle_f32x4((__m512)a, (__m512)a, 0x4e), 0xff00);
}

// Numbers as the nearest bytes, ties to even; the numbers.
inline Integers round_to_bytes(Lanes x, int8_t* to) {
    const __m512i numbers = _mm512_cvtps_epi32((__m512)x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(numbers));
    return (Integers)numbers;
}

}  // namespace
#endif
