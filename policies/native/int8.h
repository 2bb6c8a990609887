// Products of rows of signed bytes with panels of unsigned ones, accumulated exactly.
//
// A weight [columns][k] lies in panels of 32 columns, [panel][k / 4][32][4], 128 added to each of its bytes: the instruction
// multiplies unsigned by signed. 128 times the sum of a row's bytes is taken off again.
#pragma once

#include "words.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)

namespace {

constexpr int kByteRows = 12;

// Rows [n][words] of four bytes, the factor that makes a row's sums real, and the sum of its bytes.
struct ByteRows {
    const uint32_t* at;
    const float* scale;
    const int32_t* sum;
    int64_t words;
};

template <int R>
struct ByteSums { Integers of[R][2]; };

// Not inlined: next to what follows, the compiler runs out of registers.
template <int R>
__attribute__((noinline)) void multiply_bytes(const ByteRows& x, int64_t row, const uint32_t* panel, ByteSums<R>* to) {
    const int64_t words = x.words;
    const uint32_t* at = x.at + row * words;
    Integers z[R][2] = {};
    for (int64_t k = 0; k < words; ++k) {
        const Words w0 = load_words(panel + k * kPanel), w1 = load_words(panel + k * kPanel + 16);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512i a = _mm512_set1_epi32(static_cast<int>(at[r * words + k]));
            z[r][0] = (Integers)_mm512_dpbusd_epi32((__m512i)z[r][0], (__m512i)w0, a);
            z[r][1] = (Integers)_mm512_dpbusd_epi32((__m512i)z[r][1], (__m512i)w1, a);
        }
    }
    std::memcpy(to->of, z, sizeof z);
}

// What a row's sums stand for, but for the scales.
template <int R>
inline __m512 byte_sums(const ByteSums<R>& sums, const ByteRows& x, int64_t row, int r, int half) {
    return _mm512_cvtepi32_ps((__m512i)(sums.of[r][half] - 128 * x.sum[row + r]));
}

}  // namespace
#endif
