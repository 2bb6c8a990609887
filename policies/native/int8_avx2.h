// Rotating by Hadamard matrices and rounding to bytes, by AVX2.
#pragma once

#include "int8.h"

#ifdef BYTES_BY_AVX2

namespace {

// a + b in the lower and a - b in the higher of each pair of places
inline Eight hadamard_of_register(Eight a) {
    a = (Eight)_mm256_permute_ps((__m256)a, 0xb1) + a * Eight{1, -1, 1, -1, 1, -1, 1, -1};
    a = (Eight)_mm256_permute_ps((__m256)a, 0x4e) + a * Eight{1, 1, -1, -1, 1, 1, -1, -1};
    return (Eight)_mm256_permute2f128_ps((__m256)a, (__m256)a, 1) + a * Eight{1, 1, 1, 1, -1, -1, -1, -1};
}

// Numbers as the nearest bytes, ties to even; the numbers.
inline Integers round_to_bytes(Lanes x, int8_t* to) {
    const __m256i low = _mm256_cvtps_epi32((__m256)x.low), high = _mm256_cvtps_epi32((__m256)x.high);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
    return {(Integers::Half)low, (Integers::Half)high};
}

// Halves the words of a row of bytes [k] whose products could exceed 16 bits; their other halves and number into `apart`.
//
// Two neighbours are multiplied with up to 255 each and added in 16 bits. Bytes that are at most 128 together where they are
// positive, and no less than -128 where they are negative, stay within 255 * 128 = 32,640 of 0; halves always do.
inline void set_apart(int8_t* bytes, int64_t k, Apart* apart) {
    int32_t count = 0;
#ifndef __AVXVNNI__
    const __m128i none = _mm_setzero_si128(), one = _mm_set1_epi8(1), most = _mm_set1_epi16(128);
    for (int64_t j = 0; j < k; j += 16) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + j));
        const __m128i above = _mm_maddubs_epi16(_mm_max_epi8(x, none), one);
        const __m128i below = _mm_maddubs_epi16(_mm_max_epi8(_mm_sub_epi8(none, x), none), one);
        const __m128i beyond = _mm_or_si128(_mm_cmpgt_epi16(above, most), _mm_cmpgt_epi16(below, most));
        if (_mm_testz_si128(beyond, beyond)) continue;
        const int words = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(beyond, none)));  // a bit for each that fits
        for (int w = 0; w < 4; ++w) {
            if (words >> w & 1) continue;
            int8_t *at = bytes + j + 4 * w, rest[4];
            for (int i = 0; i < 4; ++i) rest[i] = static_cast<int8_t>(at[i] - at[i] / 2), at[i] /= 2;
            Apart& to = apart[++count];
            to.word = static_cast<int32_t>(j / 4 + w);
            std::memcpy(&to.bytes, rest, 4);
        }
    }
#endif
    apart->word = count;
}

}  // namespace
#endif
