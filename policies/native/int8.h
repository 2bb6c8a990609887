// Products of rows of signed bytes with panels of unsigned ones, accumulated exactly.
//
// A weight [columns][k] lies in panels of 32 columns, [panel][k / 4][32][4], 128 added to each of its bytes where the instruction
// multiplies unsigned by signed (x86). 128 times the sum of a row's bytes is taken off again.
#pragma once

#include "products.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define BYTES_BY_AVX512
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define BYTES_BY_AVX2
#elif defined(__ARM_FEATURE_DOTPROD)
#define BYTES_BY_NEON
#endif

#if defined(BYTES_BY_AVX512) || defined(BYTES_BY_AVX2) || defined(BYTES_BY_NEON)
#define BYTES

namespace {

#ifdef BYTES_BY_NEON
constexpr int32_t kAdded = 0;
#else
constexpr int32_t kAdded = 128;
#endif

// Four bytes of a row that are multiplied with one word of a panel apart from the others.
struct Apart {
    int32_t word;
    uint32_t bytes;
};

// Rows [n][words] of four bytes, the factor that makes a row's sums real, and the sum of its bytes; of AVX2's rows [n][1 + words]
// also how many words have a part that is multiplied apart, and these parts.
struct ByteRows {
    const uint32_t* at;
    const float* scale;
    const int32_t* sum;
    int64_t words;
    const Apart* apart;
};

// A weight's scales and biases.
struct Columns {
    const float *scale, *bias;  // the bias may be null
    int64_t count;
};

template <int R>
using ByteSums = Sums<int8_t, R>;

template <int R>
inline void multiply_bytes(const ByteRows& x, int64_t row, const uint32_t* panel, ByteSums<R>* to) {
    product_sums<int8_t, R>(x.at + row * x.words, x.words, x.words, panel, to);
#ifdef BYTES_BY_AVX2
    for (int r = 0; r < R; ++r) {
        const Apart* part = x.apart + (row + r) * (1 + x.words);
        for (const Apart* end = part + 1 + part->word; ++part < end;)
            for (int half = 0; half < 2; ++half)
                to->of[r][half] = multiply_add<int8_t>(to->of[r][half], part->bytes,
                                                       load_words(panel + part->word * kPanel + kLanes * half));
    }
#endif
}

// What a row's sums stand for, but for the scales.
template <int R>
inline Lanes byte_sums(const ByteSums<R>& sums, const ByteRows& x, int64_t row, int r, int half) {
    return converted<Lanes>(sums.of[r][half] - kAdded * x.sum[row + r]);
}

}  // namespace
#endif
