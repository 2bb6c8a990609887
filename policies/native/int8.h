// Products of rows of signed bytes with panels of unsigned ones, accumulated exactly.
//
// A weight [columns][k] lies in panels of 32 columns, [panel][k / 4][32][4], 128 added to each of its bytes: the instruction
// multiplies unsigned by signed. 128 times the sum of a row's bytes is taken off again.
#pragma once

#include "products.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)

namespace {

// Rows [n][words] of four bytes, the factor that makes a row's sums real, and the sum of its bytes.
struct ByteRows {
    const uint32_t* at;
    const float* scale;
    const int32_t* sum;
    int64_t words;
};

template <int R>
using ByteSums = Sums<int8_t, R>;

template <int R>
inline void multiply_bytes(const ByteRows& x, int64_t row, const uint32_t* panel, ByteSums<R>* to) {
    product_sums<int8_t, R>(x.at + row * x.words, x.words, x.words, panel, to);
}

// What a row's sums stand for, but for the scales.
template <int R>
inline __m512 byte_sums(const ByteSums<R>& sums, const ByteRows& x, int64_t row, int r, int half) {
    return _mm512_cvtepi32_ps((__m512i)(sums.of[r][half] - 128 * x.sum[row + r]));
}

}  // namespace
#endif
